// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What the commands for people need to know of a terminal: whether there is one, and how wide it is.
#pragma once

#include <cstddef>
#include <cstdio>

namespace finrace {

/// A terminal that shows colours. NO_COLOR and TERM=dumb are respected.
bool shows_colours(std::FILE* file);

/// Columns of the terminal behind standard output; 100 if there is none.
std::size_t terminal_width();

} // namespace finrace
