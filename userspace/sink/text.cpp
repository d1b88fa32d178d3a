// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/text.h"

#include <algorithm>

#include <fmt/format.h>

namespace finrace {

std::string Paint::in(std::string_view code, std::string_view text) const
{
    return on_ ? fmt::format("\x1b[{}m{}\x1b[0m", code, text) : std::string(text);
}

namespace {

/// Takes what comes before `separator` off the front of `text`.
std::string_view take_until(std::string_view& text, char separator)
{
    const std::size_t end = std::min(text.find(separator), text.size());
    const std::string_view front = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    return front;
}

} // namespace

std::size_t columns(std::string_view text)
{
    std::size_t count = 0;
    bool steers = false;
    for (const char c : text) {
        if (c == '\x1b')
            steers = true;
        else if (steers)
            steers = c != 'm';
        else if ((static_cast<unsigned char>(c) & 0xc0U) != 0x80) // not within a character
            ++count;
    }
    return count;
}

std::string cut(std::string_view text, std::size_t width)
{
    if (columns(text) <= width)
        return std::string(text);
    if (width == 0)
        return {};
    std::size_t count = 0;
    bool steers = false;
    bool painted = false;
    std::size_t end = 0;
    for (; end < text.size(); ++end) {
        const char c = text[end];
        if (c == '\x1b') {
            steers = painted = true;
        } else if (steers) {
            steers = c != 'm';
        } else if ((static_cast<unsigned char>(c) & 0xc0U) != 0x80 && ++count == width) {
            break;
        }
    }
    return fmt::format("{}…{}", text.substr(0, end), painted ? "\x1b[0m" : "");
}

std::vector<std::string> wrap(std::string_view text, std::size_t width)
{
    std::vector<std::string> lines;
    while (!text.empty()) {
        std::string_view paragraph = take_until(text, '\n');
        const std::size_t indent = std::min(paragraph.find_first_not_of(' '), paragraph.size());
        paragraph.remove_prefix(indent);
        std::string line(indent, ' ');
        while (!paragraph.empty()) {
            const std::string_view word = take_until(paragraph, ' ');
            if (line.size() > indent && columns(line) + 1 + columns(word) > width) {
                lines.push_back(line);
                line.assign(indent, ' ');
            }
            if (line.size() > indent)
                line += ' ';
            line += word;
        }
        lines.push_back(line);
    }
    return lines;
}

std::string printable(std::string_view bytes)
{
    std::string text(bytes);
    std::replace_if(
        text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    return text;
}

} // namespace finrace
