// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a terminal sends for keys, taken apart: characters, Enter, Escape and the like. Sequences for other keys
// (arrows, functions, what the terminal answers) are passed over as a whole. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace finrace {

struct Key {
    enum class Kind { character, enter, escape, backspace, erase_line, redraw } kind;
    std::string text{}; ///< of a character: UTF-8, as it came

    bool operator==(const Key&) const = default;
};

class Keyboard {
public:
    /// Bytes as they come; a sequence may come in pieces.
    std::vector<Key> take(std::string_view bytes);
    /// Nothing has followed for a while: a lone escape character was the Escape key.
    std::vector<Key> settle();

private:
    std::string pending_; ///< a sequence's beginning
};

} // namespace finrace
