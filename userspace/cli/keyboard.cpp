// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/keyboard.h"

#include <cstddef>
#include <optional>

namespace finrace {

namespace {

constexpr char escape = '\x1b';
constexpr std::size_t longest_sequence = 64;

/// Bytes of the character that `first` begins, in UTF-8.
std::size_t length_of(unsigned char first)
{
    if (first >= 0xf0)
        return 4;
    if (first >= 0xe0)
        return 3;
    return first >= 0xc0 ? 2 : 1;
}

/// Bytes of the sequence at the front of `text`, which begins with an escape character; nothing if it is not complete.
/// ECMA-48 5.4: CSI, parameters, a final byte; SS3 and one more; Escape and a character is that key with Alt.
std::optional<std::size_t> sequence_length(std::string_view text)
{
    if (text.size() < 2)
        return std::nullopt;
    if (text[1] == 'O')
        return text.size() < 3 ? std::nullopt : std::optional<std::size_t>(3);
    if (text[1] != '[')
        return text[1] == escape ? 1 : 2;
    for (std::size_t i = 2; i < text.size(); ++i)
        if (text[i] >= '@' && text[i] <= '~')
            return i + 1;
    return text.size() > longest_sequence ? std::optional(text.size()) : std::nullopt;
}

std::optional<Key> control_key(char c)
{
    switch (c) {
    case '\r':
    case '\n':
        return Key{.kind = Key::Kind::enter};
    case '\b':
    case '\x7f':
        return Key{.kind = Key::Kind::backspace};
    case '\x15': // Ctrl-U
        return Key{.kind = Key::Kind::erase_line};
    case '\f': // Ctrl-L
        return Key{.kind = Key::Kind::redraw};
    default:
        return std::nullopt;
    }
}

} // namespace

std::vector<Key> Keyboard::take(std::string_view bytes)
{
    std::vector<Key> keys;
    pending_ += bytes;
    std::string_view left = pending_;
    while (!left.empty()) {
        std::size_t length = 1;
        if (left.front() == escape) {
            const std::optional<std::size_t> whole = sequence_length(left);
            if (!whole)
                break;
            length = *whole;
            if (length == 1)
                keys.push_back({.kind = Key::Kind::escape});
        } else if (const unsigned char first = static_cast<unsigned char>(left.front());
                   first < 0x20 || first == 0x7f) {
            if (const std::optional<Key> key = control_key(left.front()))
                keys.push_back(*key);
        } else {
            length = length_of(first);
            if (length > left.size())
                break;
            keys.push_back({.kind = Key::Kind::character, .text = std::string(left.substr(0, length))});
        }
        left.remove_prefix(length);
    }
    pending_.erase(0, pending_.size() - left.size());
    return keys;
}

std::vector<Key> Keyboard::settle()
{
    const bool pressed = pending_.size() == 1 && pending_.front() == escape;
    pending_.clear();
    return pressed ? std::vector<Key>{{.kind = Key::Kind::escape}} : std::vector<Key>();
}

} // namespace finrace
