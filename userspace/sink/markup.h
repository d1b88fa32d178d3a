// SPDX-License-Identifier: GPL-2.0-only OR MIT
// HTML and SVG as they are written: every text and every attribute's value is escaped, every element is closed. Names
// of elements and attributes are the program's own.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace finrace {

class Markup {
public:
    struct Attribute {
        std::string_view name;
        std::string value;
    };
    using Attributes = std::initializer_list<Attribute>;

    Markup& open(std::string_view element, Attributes attributes = {});
    /// The innermost element that is open.
    Markup& close();
    /// An element that holds nothing.
    Markup& leaf(std::string_view element, Attributes attributes = {});
    /// An element that holds this text alone.
    Markup& element(std::string_view element, Attributes attributes, std::string_view text);
    /// UTF-8; what is a control character becomes "?".
    Markup& text(std::string_view text);
    /// The program's own: a style sheet.
    Markup& style(std::string_view sheet);
    Markup& add(const Markup& inner);

    /// All of it, with what is open closed.
    [[nodiscard]] std::string take();

private:
    void begin(std::string_view element, Attributes attributes);

    std::string text_;
    std::vector<std::string> open_;
};

} // namespace finrace
