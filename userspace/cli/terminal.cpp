// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/terminal.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include <sys/ioctl.h>
#include <unistd.h>

namespace finrace {

bool shows_colours(std::FILE* file)
{
    const char* no_color = std::getenv("NO_COLOR");
    const char* term = std::getenv("TERM");
    return ::isatty(::fileno(file)) != 0 && (no_color == nullptr || *no_color == '\0') &&
           (term == nullptr || std::string_view(term) != "dumb");
}

std::optional<TerminalSize> terminal_size()
{
    winsize size{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0)
        return std::nullopt;
    return TerminalSize{.columns = size.ws_col, .rows = size.ws_row};
}

std::size_t terminal_width()
{
    const auto size = terminal_size();
    return size ? std::max<std::size_t>(size->columns, 40) : 100;
}

} // namespace finrace
