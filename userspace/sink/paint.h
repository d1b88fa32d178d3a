// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Colours for a terminal, or none.
#pragma once

#include <string>
#include <string_view>

#include <fmt/format.h>

namespace finrace {

class Paint {
public:
    explicit Paint(bool on) : on_(on) {}

    [[nodiscard]] std::string bold(std::string_view text) const { return in("1", text); }
    [[nodiscard]] std::string dim(std::string_view text) const { return in("2", text); }
    [[nodiscard]] std::string red(std::string_view text) const { return in("1;31", text); }
    [[nodiscard]] std::string green(std::string_view text) const { return in("32", text); }
    [[nodiscard]] std::string yellow(std::string_view text) const { return in("33", text); }
    [[nodiscard]] std::string cyan(std::string_view text) const { return in("36", text); }

private:
    [[nodiscard]] std::string in(std::string_view code, std::string_view text) const
    {
        return on_ ? fmt::format("\x1b[{}m{}\x1b[0m", code, text) : std::string(text);
    }

    bool on_;
};

} // namespace finrace
