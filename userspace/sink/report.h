// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A diagnosis for people and for programs: what died and of what, the most telling instance, the pools that will race,
// and which setting to change to what.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/diagnosis.h"
#include "sink/sentences.h"
#include "sink/text.h"

namespace finrace {

/// Lines for the terminal, each ended.
std::string report_text(const Diagnosis& diagnosis, const Watched& watched, const Paint& paint, std::size_t width);
nlohmann::ordered_json report_json(const Diagnosis& diagnosis, const Watched& watched);

std::string_view to_string(TakenAt place);
std::string_view to_string(Diagnosis::State state);

} // namespace finrace
