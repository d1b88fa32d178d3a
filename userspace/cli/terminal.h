// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What the commands for people need to know of a terminal: whether there is one, and how wide it is.
#pragma once

#include <cstddef>
#include <cstdio>
#include <optional>

namespace finrace {

/// A terminal that shows colours. NO_COLOR and TERM=dumb are respected.
bool shows_colours(std::FILE* file);

struct TerminalSize {
    std::size_t columns;
    std::size_t rows;
};
/// Of the terminal behind standard output, if there is one that tells.
std::optional<TerminalSize> terminal_size();

/// Columns for text that is wrapped: the terminal's, but 40 at least; 100 if there is none.
std::size_t terminal_width();

} // namespace finrace
