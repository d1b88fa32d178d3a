// SPDX-License-Identifier: GPL-2.0-only OR MIT
// core/reason: why an upstream closed, by its other closes around that moment; a pair just inside and just outside each
// boundary.
#include <catch2/catch.hpp>

#include <optional>

#include "core/reason.h"
#include "core/upstream.h"
#include "driven_socket.h"

using namespace finrace;
using finrace::test::DrivenSocket;

namespace {

constexpr std::uint64_t ms = DrivenSocket::ms;

/// A connection's end by a FIN at `at_ms`, after `exchanges` answered ones and so much rest; with `raced`, one more
/// request had been sent just before.
event closed(std::uint64_t id, std::uint64_t at_ms, std::uint64_t rested_ms, int exchanges = 1, bool raced = false)
{
    DrivenSocket s;
    const std::uint64_t end_ns = 10'000'000 * ms + at_ms * ms;
    s.now_ns = end_ns - rested_ms * ms - static_cast<std::uint64_t>(exchanges) * ms;
    s.open();
    for (int i = 0; i < exchanges; ++i) {
        s.request(100);
        s.wait_ms(1);
        s.receive(1000);
    }
    s.wait_ms(rested_ms - (raced ? 1 : 0));
    if (raced) {
        s.request(100);
        s.wait_ms(1);
    }
    s.fin(raced ? std::optional<std::uint32_t>(0) : std::nullopt);
    event e = s.last();
    e.connection.id = id;
    return e;
}

const std::optional<IdleTimeout> five_seconds =
    IdleTimeout{.ms = 5000, .lowest_ms = 5000, .highest_ms = 5010, .samples = 5};

Reason reason_among(const std::vector<event>& others, const event& e, const std::optional<IdleTimeout>& timeout)
{
    CloseHistory history;
    for (const event& other : others)
        history.note(other);
    history.note(e);
    return history.reason(e, timeout);
}

} // namespace

TEST_CASE("the upstream's timer", "[reason]")
{
    // 2 % and 50 ms
    CHECK(reason_among({}, closed(1, 0, 4850, 1, true), five_seconds) == Reason::idle_timer);
    CHECK(reason_among({}, closed(1, 0, 4849, 1, true), five_seconds) == Reason::unknown);
    CHECK(reason_among({}, closed(1, 0, 5160, 1, true), five_seconds) == Reason::idle_timer);
    CHECK(reason_among({}, closed(1, 0, 5161, 1, true), five_seconds) == Reason::unknown);
    CHECK(reason_among({}, closed(1, 0, 5000, 1, true), std::nullopt) == Reason::unknown);
    // Its timer explains a crowd as well.
    CHECK(reason_among({closed(2, 0, 5000), closed(3, 0, 5000)}, closed(1, 0, 5000, 1, true), five_seconds) ==
          Reason::idle_timer);
}

TEST_CASE("a restart", "[reason]")
{
    const event raced = closed(1, 1000, 300, 1, true);
    CHECK(reason_among({closed(2, 900, 1200), closed(3, 1100, 2000)}, raced, five_seconds) == Reason::restart);
    CHECK(reason_among({closed(2, 899, 1200), closed(3, 1100, 2000)}, raced, five_seconds) == Reason::unknown);
    // Those that rested alike may have met a timer, unless it is known and was far.
    CHECK(reason_among({closed(2, 1000, 301), closed(3, 1000, 600)}, raced, std::nullopt) == Reason::unknown);
    CHECK(reason_among({closed(2, 1000, 301), closed(3, 1000, 601)}, raced, std::nullopt) == Reason::restart);
    const event rested = closed(1, 1000, 2400, 1, true);
    CHECK(reason_among({closed(2, 1000, 2499), closed(3, 1000, 2499)}, rested, five_seconds) == Reason::restart);
    CHECK(reason_among({closed(2, 1000, 2500), closed(3, 1000, 2500)}, rested, five_seconds) == Reason::unknown);
    // Handlers that close right behind their answers, several at once, are none.
    CHECK(reason_among({closed(2, 1000, 11), closed(3, 1000, 1200)}, raced, five_seconds) == Reason::restart);
    CHECK(reason_among({closed(2, 1000, 10), closed(3, 1000, 1200)}, raced, five_seconds) == Reason::unknown);
    const event behind = closed(1, 1000, 10, 1, true);
    CHECK(reason_among({closed(2, 1000, 700), closed(3, 1000, 1200)}, behind, five_seconds) == Reason::unknown);
    CHECK(reason_among({closed(2, 1000, 700), closed(3, 1000, 1200), closed(4, 1000, 1900)}, behind, std::nullopt) ==
          Reason::unknown);
}

TEST_CASE("a number of requests", "[reason]")
{
    const event raced = closed(1, 9000, 2, 10, true);
    std::vector<event> others;
    for (std::uint64_t i = 0; i < 3; ++i)
        others.push_back(closed(10 + i, 1000 * i, 5, 10));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unknown);
    others.push_back(closed(20, 5000, 5, 10));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::request_limit);
    others.push_back(closed(21, 6000, 5, 9));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::request_limit); // 5 of 6
    others.push_back(closed(22, 6500, 5, 9));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unannounced); // 5 of 7
    // A crowd that reaches it at one instant is no restart; nor is a restart of what had served alike such a limit.
    others.resize(4);
    others.push_back(closed(30, 9000, 5, 9));
    others.push_back(closed(31, 9000, 700, 8));
    CHECK(reason_among(others, raced, five_seconds) == Reason::request_limit);
    std::vector<event> crowd;
    for (std::uint64_t i = 0; i < 6; ++i)
        crowd.push_back(closed(10 + i, 9000, 50, 10));
    CHECK(reason_among(crowd, closed(1, 9000, 11, 10, true), five_seconds) == Reason::restart);
    // Connections used once each say nothing of a limit.
    std::vector<event> single;
    for (std::uint64_t i = 0; i < 6; ++i)
        single.push_back(closed(10 + i, 1000 * i, 5, 1));
    CHECK(reason_among(single, closed(1, 9000, 2, 1, true), std::nullopt) == Reason::unannounced);
}

TEST_CASE("a server that closes behind its answers and does not say so", "[reason]")
{
    const event raced = closed(1, 9000, 10, 2, true);
    std::vector<event> others{closed(10, 1000, 0)};
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unknown);
    others.push_back(closed(11, 2000, 10, 7));
    CHECK(reason_among(others, raced, five_seconds) == Reason::unannounced);
    CHECK(reason_among(others, closed(1, 9000, 11, 2, true), std::nullopt) == Reason::unknown);
    others.push_back(closed(12, 3000, 5000));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unknown); // 3 of 4
    others.push_back(closed(13, 4000, 3));
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unannounced); // 4 of 5
    // What ends at one instant is no witness of its own.
    CHECK(reason_among({closed(10, 9000, 0), closed(11, 9000, 0)}, raced, std::nullopt) == Reason::unknown);
}

TEST_CASE("short of room", "[reason]")
{
    const event raced = closed(1, 20'000, 1000, 2, true);
    std::vector<event> others{closed(2, 10'000, 1500, 3), closed(3, 12'000, 1600, 4)};
    CHECK(reason_among(others, raced, five_seconds) == Reason::unknown);
    others.push_back(closed(4, 15'000, 900, 5));
    CHECK(reason_among(others, raced, five_seconds) == Reason::early_purge);
    CHECK(reason_among(others, raced, std::nullopt) == Reason::unknown);
    // Half the timer, or more: a timer as well, perhaps, that is looked at once in a while.
    CHECK(reason_among(others, closed(1, 20'000, 2499, 2, true), five_seconds) == Reason::early_purge);
    CHECK(reason_among(others, closed(1, 20'000, 2500, 2, true), five_seconds) == Reason::unknown);
    others[1] = closed(3, 12'000, 2500, 4);
    CHECK(reason_among(others, raced, five_seconds) == Reason::unknown);
    others[1] = closed(3, 12'000, 2499, 4);
    CHECK(reason_among(others, raced, five_seconds) == Reason::early_purge);
    others.front() = closed(2, 9'999, 1500, 3); // too long ago
    CHECK(reason_among(others, raced, five_seconds) == Reason::unknown);
}

TEST_CASE("a request written into a closed connection tells of the close before it", "[reason]")
{
    DrivenSocket s;
    s.open();
    s.request(100);
    s.receive(1000);
    s.wait_ms(5000);
    s.fin();
    s.wait_ms(3000);
    s.request(100);
    REQUIRE(s.last().kind == EVENT_SENT_AFTER_FIN);
    CHECK(reason_among({}, s.last(), five_seconds) == Reason::idle_timer);
}

TEST_CASE("every reason that is known is explained", "[reason]")
{
    for (const Reason reason :
         {Reason::idle_timer, Reason::restart, Reason::request_limit, Reason::unannounced, Reason::early_purge}) {
        const ReasonText* text = text_of_reason(to_string(reason));
        REQUIRE(text != nullptr);
        CHECK(text->reason == reason);
        CHECK(text_of(Cause::keepalive_race).evidence.find(to_string(reason)) != std::string_view::npos);
    }
    CHECK(reason_texts().size() == 5);
    CHECK(text_of_reason("unknown") == nullptr);
}
