// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What the commands for people need of a terminal: whether there is one, how wide, and colours if so.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "sink/paint.h"

namespace finrace {

/// A terminal that shows colours. NO_COLOR and TERM=dumb are respected.
bool is_terminal(std::FILE* file);

/// Columns of the terminal behind standard output; 100 if there is none.
std::size_t terminal_width();

/// Lines of at most `width` columns, broken at spaces.
std::vector<std::string> wrap(std::string_view text, std::size_t width);

} // namespace finrace
