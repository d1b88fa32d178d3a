// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A diagnosis as one page for a browser, to be kept with an incident: the report's own sentences, the most telling
// instance of each finding as a sequence diagram, and each pool's idle times. It loads nothing and runs nothing (its
// own Content-Security-Policy forbids it), and it tells all in words as well.
#pragma once

#include <string>

#include "core/diagnosis.h"
#include "sink/sentences.h"

namespace finrace {

/// HTML5 in UTF-8. Names of hosts and processes are foreign: they are escaped. Times are in the local time zone.
std::string report_html(const Diagnosis& diagnosis, const Watched& watched);

} // namespace finrace
