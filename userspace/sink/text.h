// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Text for a terminal: colours or none, lines that fit, and nothing in them that would steer the terminal.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

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
    [[nodiscard]] std::string in(std::string_view code, std::string_view text) const;

    bool on_;
};

/// That the terminal takes for it: of UTF-8 without wide or combining characters, perhaps in Paint's colours.
std::size_t columns(std::string_view text);

/// The same, or as much of it as leaves room for an "…" within `width` columns. Colours end with it.
std::string cut(std::string_view text, std::size_t width);

/// Lines of at most `width` columns, broken at spaces; the text's own line breaks and indents stay.
std::vector<std::string> wrap(std::string_view text, std::size_t width);

/// A name as the kernel has it, any bytes, fit to be shown: what is not printable ASCII becomes "?".
std::string printable(std::string_view bytes);

} // namespace finrace
