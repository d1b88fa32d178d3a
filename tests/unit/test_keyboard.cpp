// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Keys as a terminal sends them.
#include <catch2/catch.hpp>

#include "cli/keyboard.h"

using namespace finrace;

namespace {

const Key enter{.kind = Key::Kind::enter};
const Key escape{.kind = Key::Kind::escape};
const Key backspace{.kind = Key::Kind::backspace};

Key character(const char* text)
{
    return {.kind = Key::Kind::character, .text = text};
}

} // namespace

TEST_CASE("characters and keys that edit a line")
{
    Keyboard keyboard;
    CHECK(keyboard.take("p ?") == std::vector<Key>{character("p"), character(" "), character("?")});
    CHECK(keyboard.take("a\x7f\b\r\n") == std::vector<Key>{character("a"), backspace, backspace, enter, enter});
    CHECK(keyboard.take("\x15\f") == std::vector<Key>{{.kind = Key::Kind::erase_line}, {.kind = Key::Kind::redraw}});
    CHECK(keyboard.take(std::string_view("\x00\x01\x1f", 3)).empty());
}

TEST_CASE("a character in UTF-8 may come in pieces")
{
    Keyboard keyboard;
    CHECK(keyboard.take("\xc3").empty());
    CHECK(keyboard.take("\xa9q") == std::vector<Key>{character("\xc3\xa9"), character("q")});
}

TEST_CASE("sequences of other keys mean nothing, whole or in pieces")
{
    Keyboard keyboard;
    CHECK(keyboard.take("\x1b[A\x1bOP\x1b[15~\x1b[1;5Cq") == std::vector<Key>{character("q")});
    CHECK(keyboard.take("\x1b").empty());
    CHECK(keyboard.take("[1;").empty());
    CHECK(keyboard.take("5Dp") == std::vector<Key>{character("p")});
    CHECK(keyboard.take("\x1bq") == std::vector<Key>{}); // Alt-q is not q
}

TEST_CASE("Escape alone is a key once nothing has followed it")
{
    Keyboard keyboard;
    CHECK(keyboard.take("a\x1b") == std::vector<Key>{character("a")});
    CHECK(keyboard.settle() == std::vector<Key>{escape});
    CHECK(keyboard.settle().empty());
    CHECK(keyboard.take("\x1b\x1b") == std::vector<Key>{escape});
    CHECK(keyboard.settle() == std::vector<Key>{escape});
    CHECK(keyboard.take("\x1b[").empty());
    CHECK(keyboard.settle().empty());
    CHECK(keyboard.take("Aq") == std::vector<Key>{character("A"), character("q")});
}

TEST_CASE("what never ends is not kept for ever")
{
    Keyboard keyboard;
    CHECK(keyboard.take("\x1b[" + std::string(100, '1')).empty());
    CHECK(keyboard.take("q") == std::vector<Key>{character("q")});
}
