// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Verdicts for eyes, word for word, and the queue that waits for their ends.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <ctime>

#include <catch2/catch.hpp>

#include "sink/facts.h"
#include "sink/text.h"
#include "sink/timeline.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

Sighting sighting(const event& judged, const event& last, Verdict verdict = race())
{
    return {.judged = judged,
            .last = last,
            .verdict = std::move(verdict),
            .outcome = {},
            .idle_timeout = known_upstream().idle_timeout.timeout(),
            .process_name = "nginx"};
}

std::string show(const Sighting& one, bool colours = false)
{
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    return timeline(one, WallClock(1'769'860'800'000'000'000), Paint(colours), 120);
}

} // namespace

TEST_CASE("a crossing as a timeline")
{
    CHECK(show(sighting(crossing(), crossing_closed())) ==
          "12:00:10.020  keepalive_race (fin_crossed)  proven\n"
          "  nginx[1234]  10.0.0.1:41234 → 10.0.0.2:8000  request 3 on this connection\n"
          "        -981     ms   ·   idle      from here; this upstream closes after 1000 ms (4 closes, spread 5 ms)\n"
          "          +0.000 ms  ──▶  request   176 bytes\n"
          "         +20.113 ms  ◀──  FIN       acknowledges 0 of 176 request bytes: sent before the request arrived\n"
          "         +40.113 ms  ◀──  RST       its number is the FIN's: answers what was sent before the FIN came\n"
          "  They crossed.\n"
          "\n");
}

TEST_CASE("a timeline in a narrow terminal")
{
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    const Sighting one = sighting(crossing(), crossing_closed());
    const WallClock clock(1'769'860'800'000'000'000);
    CHECK(timeline(one, clock, Paint(false), 72) ==
          "12:00:10.020  keepalive_race (fin_crossed)  proven\n"
          "  nginx[1234]  10.0.0.1:41234 → 10.0.0.2:8000  request 3 on this\n"
          "  connection\n"
          "        -981     ms   ·   idle      from here; this upstream closes\n"
          "                                    after 1000 ms (4 closes, spread 5\n"
          "                                    ms)\n"
          "          +0.000 ms  ──▶  request   176 bytes\n"
          "         +20.113 ms  ◀──  FIN       acknowledges 0 of 176 request bytes:\n"
          "                                    sent before the request arrived\n"
          "         +40.113 ms  ◀──  RST       its number is the FIN's: answers\n"
          "                                    what was sent before the FIN came\n"
          "  They crossed.\n"
          "\n");
    CHECK_THAT(timeline(one, clock, Paint(false), 48), Catch::Contains("         +20.113 ms  ◀──  FIN\n"
                                                                       "        acknowledges 0 of 176 request bytes:\n"
                                                                       "        sent before the request arrived\n"));
}

TEST_CASE("a server's end as a timeline")
{
    Verdict verdict = race(Variant::none);
    verdict.cause = Cause::closed_on_request;
    Sighting one = sighting(closed_unread(), closed_unread(), verdict);
    one.process_name = "gunicorn";
    CHECK(show(one) == "12:00:10.021  closed_on_request  proven\n"
                       "  gunicorn[77]  10.0.0.2:8000 ← 10.0.0.1:41234\n"
                       "        -982.000 ms  ──▶  answer\n"
                       "          -1.000 ms  ◀──  request   176 bytes unread\n"
                       "          +0.000 ms  ──▶  RST       this host resets\n"
                       "  They crossed.\n"
                       "\n");
    one = sighting(late_segment(), late_segment(), verdict);
    CHECK(show(one) == "12:00:10.021  closed_on_request  proven\n"
                       "  10.0.0.2:8000 ← 10.0.0.1:41234\n"
                       "       -1008.000 ms  ◀──  request\n"
                       "       -1007.000 ms  ──▶  answer\n"
                       "          -5.000 ms  ──▶  FIN       this host closes\n"
                       "          +0.000 ms  ◀──  request   176 bytes, after the close\n"
                       "  They crossed.\n"
                       "\n");
}

TEST_CASE("what the client got")
{
    Sighting one = sighting(crossing(), crossing_closed());
    const auto last_line = [&one] {
        const std::string text = show(one);
        const std::size_t message = text.find("They crossed.\n");
        REQUIRE(message != std::string::npos);
        return text.substr(message + 14);
    };
    CHECK(last_line() == "\n");
    one.outcome = retried();
    CHECK(last_line() ==
          "  Tried again 0.250 ms later, on 10.0.0.3:8001. The client 192.0.2.7:4000 (perhaps) got 200.\n\n");
    one.outcome.retry.reset();
    one.outcome.client->certainty = Certainty::likely;
    CHECK(last_line() == "  The client 192.0.2.7:4000 got 200.\n\n");
    one.outcome.client->status = 0;
    CHECK(last_line() == "  The client 192.0.2.7:4000 was answered; the status can't be read.\n\n");
    one.outcome.client->answered = false;
    one.outcome.client->left = true;
    CHECK(last_line() == "  The client 192.0.2.7:4000 got no answer. It had left by then.\n\n");
}

TEST_CASE("a stale send puts the FIN before the request, and takes the request's size from the end")
{
    event judged = in_exchange(EVENT_SENT_AFTER_FIN, request_at);
    judged.request_bytes = 0;
    judged.connection.flags |= CONNECTION_PEER_FIN | CONNECTION_SENT_AFTER_FIN;
    judged.connection.peer_fin_ns = request_at - 350'000;
    event last = judged;
    last.kind = EVENT_CLOSED;
    last.request_bytes = 30;
    const std::string text = show(sighting(judged, last));
    CHECK(text.find("-0.350 ms  ◀──  FIN\n") < text.find("+0.000 ms  ──▶  request   30 bytes, sent after"));
    CHECK(text.find("acknowledges") == std::string::npos);
}

TEST_CASE("no time is a negative zero")
{
    event at_once = crossing();
    at_once.connection.idle_ms = 0;
    at_once.timestamp_ns = at_once.connection.peer_fin_ns = at_once.connection.request_ns - 400;
    const std::string text = show(sighting(at_once, at_once));
    CHECK_THAT(text, Catch::Contains("          +0     ms   ·   idle"));
    CHECK_THAT(text, Catch::Contains("          +0.000 ms  ◀──  FIN"));
    CHECK_THAT(text, !Catch::Contains("-0"));
    CHECK(!std::signbit(milliseconds_between(500, 100)));
}

TEST_CASE("a refused connection is told from its SYN")
{
    const std::string text = show(sighting(refused(), refused()));
    CHECK_THAT(text, Catch::Contains("          +0.000 ms  ──▶  SYN\n"));
    CHECK_THAT(text, Catch::Contains("          +0.250 ms  ◀──  RST       refuses the SYN\n"));
}

TEST_CASE("a request that met silence: how often it left, and who gave up")
{
    event e = crossing_closed();
    e.kind = EVENT_CLOSED;
    e.connection.flags &=
        ~static_cast<std::uint32_t>(CONNECTION_PEER_FIN | CONNECTION_PEER_RESET | CONNECTION_LOCAL_FIN |
                                    CONNECTION_LOCAL_RESET | CONNECTION_LOCAL_FIRST);
    e.retransmits = 5;
    e.observed |= OBSERVED_SOCKET_ERROR;
    e.socket_error = ETIMEDOUT;
    Sighting one = sighting(e, e);
    one.verdict.cause = Cause::path_dropped;
    one.verdict.variant = Variant::none;
    CHECK_THAT(show(one), Catch::Contains("none acknowledged; 5 retransmissions on this connection\n"));
    CHECK_THAT(show(one), Catch::Contains(" ·   gave up   ETIMEDOUT\n"));
    one.verdict.variant = Variant::unanswered_probes;
    CHECK(show(one).find("none acknowledged") == std::string::npos);
    e.connection.flags |= CONNECTION_LOCAL_FIN | CONNECTION_LOCAL_FIRST;
    e.connection.local_close_ns = e.timestamp_ns;
    e.socket_error = 0;
    one = sighting(e, e);
    one.verdict.cause = Cause::accept_stalled;
    one.verdict.variant = Variant::gave_up;
    CHECK_THAT(show(one), Catch::Contains("none acknowledged; 5 retransmissions on this connection\n"));
    CHECK_THAT(show(one), Catch::Contains("──▶  FIN       this host closes\n"));
}

TEST_CASE("a later exchange on the same connection does not mix into the story")
{
    event later = crossing_closed();
    later.connection.exchange = 4;
    later.connection.request_ns += 5 * ms;
    CHECK(show(sighting(crossing(), later)) == show(sighting(crossing(), crossing())));
}

TEST_CASE("no story needs more than ten lines, and none breaks the terminal")
{
    for (unsigned kind = 1; kind < EVENT_KINDS; ++kind) {
        event e = crossing_closed();
        e.kind = static_cast<std::uint8_t>(kind);
        e.connection.flags = 0xffffffffU & ~static_cast<std::uint32_t>(CONNECTION_ADOPTED_IN_EXCHANGE);
        e.connection.local_close_ns = e.timestamp_ns;
        e.response_bytes = 1;
        Sighting one = sighting(e, e);
        one.process_name = "\x1b[2J\xff\n";
        one.verdict.message = "On this host, \x1b[2J[7] closed."; // a server's name
        const std::string text = show(one);
        CHECK(std::count(text.begin(), text.end(), '\n') <= 10);
        CHECK(text.find('\x1b') == std::string::npos);
        CHECK(text.find('\xff') == std::string::npos);
        CHECK_THAT(text, Catch::Contains("?[2J??[1234]") && Catch::Contains("On this host, ?[2J[7] closed."));
    }
    CHECK_THAT(show(sighting(crossing(), crossing()), true), Catch::Contains("\x1b[1;31mkeepalive_race\x1b[0m"));
}

TEST_CASE("a sighting waits for its connection's end, or half a second")
{
    SightingQueue queue;
    queue.add(sighting(crossing(), crossing()));
    const std::uint64_t seen_at = crossing().timestamp_ns;
    CHECK(queue.take_ready(seen_at + SightingQueue::hold_ns - 1).empty());

    event other = crossing_closed();
    other.connection.id = 1;
    queue.follow(other);
    CHECK(queue.take_ready(seen_at).empty());
    queue.follow(crossing_closed());
    const std::vector<Sighting> closed = queue.take_ready(seen_at);
    REQUIRE(closed.size() == 1);
    CHECK(closed[0].last.kind == EVENT_CLOSED);

    queue.add(sighting(crossing(), crossing()));
    CHECK(queue.take_ready(seen_at + SightingQueue::hold_ns).size() == 1);

    for (std::size_t i = 0; i < SightingQueue::capacity + 5; ++i)
        queue.add(sighting(crossing(), crossing()));
    CHECK(queue.take_ready(seen_at).size() == 5);
    CHECK(queue.take_all().size() == SightingQueue::capacity);
}

TEST_CASE("columns are what the terminal shows")
{
    CHECK(columns("a → b") == 5);
    CHECK(columns(Paint(true).red("a → b")) == 5);
    CHECK(columns("") == 0);
}

TEST_CASE("wrapped text keeps its breaks and indents")
{
    CHECK(wrap("one two three", 7) == std::vector<std::string>{"one two", "three"});
    CHECK(wrap("a\n  b c\nd", 4) == std::vector<std::string>{"a", "  b", "  c", "d"});
    CHECK(wrap("longerthanwidth x", 5) == std::vector<std::string>{"longerthanwidth", "x"});
}
