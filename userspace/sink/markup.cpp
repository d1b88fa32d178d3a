// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/markup.h"

#include <algorithm>
#include <array>
#include <utility>

namespace finrace {

namespace {

void escape(std::string& out, std::string_view text)
{
    for (const char c : text) {
        switch (c) {
        case '&':
            out += "&amp;";
            break;
        case '<':
            out += "&lt;";
            break;
        case '>':
            out += "&gt;";
            break;
        case '"':
            out += "&quot;";
            break;
        case '\'':
            out += "&#39;";
            break;
        default:
            out += (static_cast<unsigned char>(c) < ' ' && c != '\n') || c == '\x7f' ? '?' : c;
        }
    }
}

/// Within a line, where white space shows.
bool is_inline(std::string_view element)
{
    constexpr std::array<std::string_view, 6> elements{"a", "b", "code", "span", "time", "tspan"};
    return std::find(elements.begin(), elements.end(), element) != elements.end();
}

} // namespace

void Markup::begin(std::string_view element, Attributes attributes)
{
    text_ += '<';
    text_ += element;
    for (const auto& [name, value] : attributes) {
        text_ += ' ';
        text_ += name;
        text_ += "=\"";
        escape(text_, value);
        text_ += '"';
    }
}

Markup& Markup::open(std::string_view element, Attributes attributes)
{
    begin(element, attributes);
    text_ += '>';
    open_.emplace_back(element);
    return *this;
}

Markup& Markup::close()
{
    text_ += "</" + open_.back() + (is_inline(open_.back()) ? ">" : ">\n");
    open_.pop_back();
    return *this;
}

Markup& Markup::leaf(std::string_view element, Attributes attributes)
{
    begin(element, attributes);
    text_ += "/>\n";
    return *this;
}

Markup& Markup::element(std::string_view element, Attributes attributes, std::string_view text)
{
    return open(element, attributes).text(text).close();
}

Markup& Markup::text(std::string_view text)
{
    escape(text_, text);
    return *this;
}

Markup& Markup::style(std::string_view sheet)
{
    text_ += "<style>\n";
    text_ += sheet;
    text_ += "</style>\n";
    return *this;
}

Markup& Markup::add(const Markup& inner)
{
    text_ += inner.text_;
    return *this;
}

std::string Markup::take()
{
    while (!open_.empty())
        close();
    return std::move(text_);
}

} // namespace finrace
