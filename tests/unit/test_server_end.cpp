// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a server on this host did to a connection that it had accepted: by itself, just inside and just outside each
// limit; as evidence for its client's verdict; and who takes which.
#include <csignal>
#include <vector>

#include <catch2/catch.hpp>

#include "core/docket.h"
#include "core/server_end.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

/// It reset the connection with half of its answer under way, and some of the request unread.
event cut()
{
    event e = closed_unread(60'000);
    e.sent_ns = closed_at - 2 * ms;
    e.unacked_bytes = 300;
    return e;
}

event killed(event e, int signal)
{
    e.connection.flags |= CONNECTION_PROCESS_ENDS;
    e.exit_code = static_cast<std::uint32_t>(signal);
    return e;
}

std::optional<Verdict> judged(const event& e)
{
    return is_server_end(e) ? judge_server_end(e) : std::nullopt;
}

std::optional<Cause> cause_of(const event& e)
{
    const auto verdict = judged(e);
    return verdict ? std::optional(verdict->cause) : std::nullopt;
}

Verdict lost(Cause cause, Certainty certainty = Certainty::likely)
{
    return {.cause = cause, .variant = Variant::none, .certainty = certainty, .incomplete = false, .message = "Lost."};
}

/// The upstream's FIN acknowledged the request and answered nothing.
event acknowledged_unanswered()
{
    event e = crossing();
    e.unacked_bytes = 0;
    e.connection.fin_unacked = 0;
    return e;
}

struct Ruling {
    Cause cause;
    Variant variant;
    Certainty certainty;
    bool has_server_end;
    bool client;
};

/// A docket that tells of outcomes, and what it delivers.
struct Court {
    std::vector<Ruling> rulings;
    Docket docket{true, [this](const Judged& judged) {
                      if (const auto& verdict = judged.classification.verdict)
                          rulings.push_back({.cause = verdict->cause,
                                             .variant = verdict->variant,
                                             .certainty = verdict->certainty,
                                             .has_server_end = judged.server_end != nullptr,
                                             .client = (judged.e.connection.flags & CONNECTION_CLIENT) != 0});
                  }};
};

} // namespace

TEST_CASE("a request unread at close is the server's idle close, if it met one", "[server]")
{
    const auto verdict = judged(closed_unread());
    REQUIRE(verdict);
    CHECK(verdict->cause == Cause::closed_on_request);
    CHECK(verdict->certainty == Certainty::likely);
    CHECK_THAT(verdict->message, Catch::Contains("gunicorn[77]") && Catch::Contains("176 bytes") &&
                                     Catch::Contains("after 981 ms of rest"));

    SECTION("shutdown() first, as servers that linger do")
    {
        event e = at_server(EVENT_LOCAL_FIN);
        e.unread_bytes = 176;
        CHECK(cause_of(e) == Cause::closed_on_request);
    }
    SECTION("followed, it is known to be all that came since the last answer")
    {
        event e = closed_unread();
        e.connection.id = 5;
        e.connection.exchange = 2;
        e.response_bytes = 176;
        CHECK(judged(e)->certainty == Certainty::proven);
        e.response_bytes = 177; // a byte of it was read
        CHECK(judged(e)->certainty == Certainty::likely);
    }
    SECTION("TLS's farewell is no request")
    {
        CHECK_FALSE(cause_of(closed_unread(FINRACE_TLS_FAREWELL_BYTES)));
        CHECK(cause_of(closed_unread(FINRACE_TLS_FAREWELL_BYTES + 1)));
    }
    SECTION("more than a flight has been read from")
    {
        CHECK(cause_of(closed_unread(one_flight_bytes)));
        CHECK_FALSE(cause_of(closed_unread(one_flight_bytes + 1)));
    }
    SECTION("without rest there was nothing to time out")
    {
        event e = closed_unread();
        e.sent_ns = e.received_ns - 900 * ms;
        CHECK(cause_of(e));
        e.sent_ns += ms;
        CHECK_FALSE(cause_of(e));
        e.sent_ns = 0; // never answered
        CHECK_FALSE(cause_of(e));
    }
    SECTION("a request that lay for long met no timer but a server that stood still")
    {
        event e = closed_unread();
        e.timestamp_ns = e.received_ns + 899 * ms;
        CHECK(cause_of(e));
        e.timestamp_ns += ms;
        CHECK_FALSE(cause_of(e));
    }
    SECTION("the client's own FIN had come before")
    {
        event e = closed_unread();
        e.old_state = TCP_STATE_CLOSE_WAIT;
        CHECK_FALSE(is_server_end(e));
    }
    SECTION("the process was ending")
    {
        CHECK_THAT(judged(killed(closed_unread(), SIGKILL))->message, Catch::Contains(", killed by signal 9,"));
        CHECK_THAT(judged(killed(closed_unread(), 3 << 8))->message, Catch::Contains(", as it exited with status 3,"));
    }
}

TEST_CASE("payload after the close is a request, if the connection had rested", "[server]")
{
    const auto verdict = judged(late_segment());
    REQUIRE(verdict);
    CHECK(verdict->cause == Cause::closed_on_request);
    CHECK(verdict->certainty == Certainty::proven);
    CHECK_THAT(verdict->message, Catch::Contains("176 bytes") && Catch::Contains("idle for 1002 ms"));

    SECTION("its client had the last word: it may be the rest of a request")
    {
        event e = late_segment();
        e.received_ns = e.sent_ns + ms;
        CHECK(judged(e)->certainty == Certainty::likely);
    }
    SECTION("TLS's farewell is no request, and two of them are as long as a short one")
    {
        CHECK_FALSE(cause_of(late_segment(FINRACE_TLS_FAREWELL_BYTES)));
        CHECK(judged(late_segment(FINRACE_TLS_FAREWELL_BYTES + 1))->certainty == Certainty::possible);
        CHECK(judged(late_segment(2 * FINRACE_TLS_FAREWELL_BYTES))->certainty == Certainty::possible);
        CHECK(judged(late_segment(2 * FINRACE_TLS_FAREWELL_BYTES + 1))->certainty == Certainty::proven);
    }
    SECTION("the server's own farewell is no answer that is cut: how long it had rested is not known")
    {
        event e = late_segment();
        e.sent_ns = e.connection.local_close_ns;
        e.unacked_bytes = FINRACE_TLS_FAREWELL_BYTES;
        CHECK_FALSE(cause_of(e));
        e.unacked_bytes++;
        CHECK(cause_of(e) == Cause::server_cut_response);
    }
    SECTION("no rest")
    {
        event e = late_segment();
        e.connection.local_close_ns = e.sent_ns + 900 * ms;
        CHECK(cause_of(e));
        e.connection.local_close_ns -= ms;
        CHECK_FALSE(cause_of(e));
    }
    SECTION("never answered")
    {
        event e = late_segment();
        e.sent_ns = 0;
        CHECK_FALSE(cause_of(e));
    }
    SECTION("right after an answer that has not been acknowledged, it costs that")
    {
        event e = late_segment();
        e.sent_ns = e.connection.local_close_ns - ms;
        e.unacked_bytes = 100;
        CHECK(cause_of(e) == Cause::server_cut_response);
        e.connection.flags &= ~CONNECTION_SOCKET_CLOSED; // its process reads on: no RST
        CHECK_FALSE(cause_of(e));
        e.connection.flags |= CONNECTION_SOCKET_CLOSED;
        e.sent_ns = e.connection.local_close_ns - 900 * ms; // its client takes nothing any more
        CHECK_FALSE(cause_of(e));
    }
}

TEST_CASE("an RST under the server's own answer cuts it", "[server]")
{
    const auto verdict = judged(cut());
    REQUIRE(verdict);
    CHECK(verdict->cause == Cause::server_cut_response);
    CHECK(verdict->certainty == Certainty::likely);
    CHECK_THAT(verdict->message, Catch::Contains("300 bytes") && Catch::Contains("60000 bytes unread"));

    event e = cut();
    e.unacked_bytes = FINRACE_TLS_FAREWELL_BYTES;
    CHECK_FALSE(cause_of(e));
    e.unacked_bytes++;
    CHECK(cause_of(e));
    e = cut();
    e.sent_ns = e.timestamp_ns - 899 * ms;
    CHECK(cause_of(e));
    e.sent_ns -= ms;
    CHECK_FALSE(cause_of(e));
    e = cut();
    e.kind = EVENT_LOCAL_FIN; // a FIN takes nothing back
    e.connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN;
    CHECK_FALSE(cause_of(e));
}

TEST_CASE("a healthy end shows nothing", "[server]")
{
    event e = at_server(EVENT_LOCAL_FIN);
    e.sent_ns = e.received_ns; // within one tick
    CHECK_FALSE(is_server_end(e));
    e.received_ns++;
    CHECK(is_server_end(e));
    CHECK_FALSE(judge_server_end(e)); // closed without an answer: its client knows whether that was a failure

    e = closed_unread();
    e.connection.flags |= CONNECTION_CLIENT;
    CHECK_FALSE(is_server_end(e));
    e = closed_unread();
    e.sent_ns = e.received_ns = 0; // a source that can't tell
    CHECK_FALSE(is_server_end(e));
    e = closed_unread();
    e.connection.flags &= ~CONNECTION_LOCAL_RESET; // it was the peer's RST, or a timer
    CHECK_FALSE(is_server_end(e));
}

TEST_CASE("what the server had read decides what its client can only guess", "[server]")
{
    SECTION("unread: the likely race is proven")
    {
        Verdict verdict = race(Variant::reset_unread);
        verdict.certainty = Certainty::likely;
        corroborate(verdict, acknowledged_unanswered(), closed_unread(), std::nullopt);
        CHECK(verdict.cause == Cause::keepalive_race);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK_THAT(verdict.message,
                   Catch::Contains("They crossed. On this host, gunicorn[77] closed with all 176 bytes "
                                   "unread, 1 ms after they had come."));
    }
    SECTION("unread, where no timeout was known: it is the race")
    {
        Verdict verdict = lost(Cause::upstream_closed);
        event e = at_server(EVENT_LOCAL_FIN);
        e.unread_bytes = 176;
        corroborate(verdict, acknowledged_unanswered(), e, std::nullopt);
        CHECK(verdict.cause == Cause::keepalive_race);
        CHECK(verdict.variant == Variant::fin_lingering);
        CHECK(verdict.certainty == Certainty::proven);

        verdict = lost(Cause::upstream_reset);
        corroborate(verdict, acknowledged_unanswered(), closed_unread(), std::nullopt);
        CHECK(verdict.variant == Variant::reset_unread);
    }
    SECTION("unread on a first request: no idle close")
    {
        Verdict verdict = lost(Cause::upstream_reset);
        event end = acknowledged_unanswered();
        end.connection.exchange = 1;
        end.connection.idle_ms = 899;
        corroborate(verdict, end, closed_unread(), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
        CHECK(verdict.certainty == Certainty::proven);
    }
    SECTION("unread, by a process that was killed: no timer's close")
    {
        Verdict verdict = lost(Cause::upstream_reset);
        corroborate(verdict, acknowledged_unanswered(), killed(closed_unread(), SIGKILL), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK_THAT(verdict.message, Catch::Contains("killed by signal 9, with all 176 bytes unread"));
    }
    SECTION("unread, by a process that was killed: what looked like a race was none")
    {
        const auto certainty = GENERATE(Certainty::possible, Certainty::likely);
        Verdict verdict = race(Variant::reset_unread);
        verdict.certainty = certainty;
        corroborate(verdict, acknowledged_unanswered(), killed(closed_unread(), SIGKILL), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
        CHECK(verdict.variant == Variant::none);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK_THAT(verdict.message, !Catch::Contains("They crossed") && Catch::Contains("killed by signal 9"));
        verdict = race(Variant::reset_unread);
        verdict.certainty = certainty;
        corroborate(verdict, acknowledged_unanswered(), killed(closed_unread(), 3 << 8), std::nullopt); // it exited
        CHECK(verdict.cause == Cause::keepalive_race);
    }
    SECTION("unread for long: the server stood still")
    {
        Verdict verdict = lost(Cause::upstream_reset);
        event e = closed_unread();
        e.timestamp_ns = e.received_ns + 900 * ms;
        corroborate(verdict, acknowledged_unanswered(), e, std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
        CHECK(verdict.certainty == Certainty::proven);
    }
    SECTION("a byte of it read: no more is known than before")
    {
        Verdict verdict = lost(Cause::upstream_reset);
        corroborate(verdict, acknowledged_unanswered(), closed_unread(175), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
        CHECK(verdict.certainty == Certainty::likely);
    }
    SECTION("all read, by a process that was killed")
    {
        Verdict verdict = lost(Cause::upstream_closed);
        corroborate(verdict, acknowledged_unanswered(), killed(at_server(EVENT_LOCAL_FIN), SIGKILL), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_closed);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK_THAT(verdict.message,
                   Catch::Contains("gunicorn[77] closed, killed by signal 9, when it had read the request"));
    }
    SECTION("read at the timeout: an event loop may read what it then drops")
    {
        Verdict verdict = race(Variant::fin_lingering);
        verdict.certainty = Certainty::likely;
        const IdleTimeout timeout{.ms = 5000, .lowest_ms = 5000, .highest_ms = 5010, .samples = 5};
        corroborate(verdict, acknowledged_unanswered(), at_server(EVENT_LOCAL_FIN), timeout);
        CHECK(verdict.cause == Cause::keepalive_race);
        CHECK(verdict.certainty == Certainty::likely);
        verdict.certainty = Certainty::possible; // near it
        corroborate(verdict, acknowledged_unanswered(), at_server(EVENT_LOCAL_FIN), timeout);
        CHECK(verdict.cause == Cause::keepalive_race);
    }
    SECTION("read, and no timeout known: what rest alone suggests does not hold")
    {
        Verdict verdict = race(Variant::fin_lingering);
        verdict.certainty = Certainty::possible;
        corroborate(verdict, acknowledged_unanswered(), at_server(EVENT_LOCAL_FIN), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_closed);
        CHECK(verdict.variant == Variant::none);
        CHECK(verdict.certainty == Certainty::likely);
        verdict = race(Variant::reset_unread);
        verdict.certainty = Certainty::possible;
        corroborate(verdict, acknowledged_unanswered(), at_server(EVENT_LOCAL_FIN), std::nullopt);
        CHECK(verdict.cause == Cause::upstream_reset);
    }
    SECTION("came after the close")
    {
        Verdict verdict = race(Variant::reset_closed);
        verdict.certainty = Certainty::possible;
        corroborate(verdict, crossing(), late_segment(), std::nullopt);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK(verdict.variant == Variant::reset_closed);

        verdict.certainty = Certainty::likely; // all but its last byte had come before
        event last_byte = late_segment(1);
        last_byte.received_ns = last_byte.sent_ns + ms;
        corroborate(verdict, crossing(), last_byte, std::nullopt);
        CHECK(verdict.certainty == Certainty::likely);
    }
    SECTION("a part unread: that is what a refusal is")
    {
        Verdict verdict = lost(Cause::request_rejected);
        corroborate(verdict, acknowledged_unanswered(), closed_unread(100), std::nullopt);
        CHECK(verdict.cause == Cause::request_rejected);
        CHECK(verdict.certainty == Certainty::proven);
        CHECK_THAT(verdict.message, Catch::Contains("100 bytes of it unread"));
    }
    SECTION("another cause is none of its business")
    {
        Verdict verdict = lost(Cause::path_dropped);
        corroborate(verdict, acknowledged_unanswered(), closed_unread(), std::nullopt);
        CHECK(verdict.cause == Cause::path_dropped);
        CHECK(verdict.certainty == Certainty::likely);
        CHECK(verdict.message == "Lost.");
    }
    SECTION("where events were lost, nothing is proven")
    {
        Verdict verdict = lost(Cause::upstream_closed);
        verdict.incomplete = true;
        corroborate(verdict, acknowledged_unanswered(), closed_unread(), std::nullopt);
        CHECK(verdict.certainty == Certainty::likely);
    }
}

TEST_CASE("with both ends here the client's verdict takes the server's evidence", "[server][docket]")
{
    Court court;
    court.docket.take(closed_unread());
    event end = acknowledged_unanswered();
    end.timestamp_ns = closed_at + ms;
    court.docket.take(end);
    court.docket.finish();
    REQUIRE(court.rulings.size() == 1);
    CHECK(court.rulings[0].client);
    CHECK(court.rulings[0].cause == Cause::keepalive_race);
    CHECK(court.rulings[0].certainty == Certainty::proven);
    CHECK(court.rulings[0].has_server_end);
    std::size_t upstreams = 0;
    court.docket.upstreams().for_each([&](const UpstreamKey*, const Upstream& upstream) {
        ++upstreams;
        std::uint64_t counted = 0;
        for (const auto& [cause, count] : upstream.counts.verdicts) {
            CHECK(count == (cause == Cause::keepalive_race ? 1 : 0));
            counted += count;
        }
        CHECK(counted == 1);
    });
    CHECK(upstreams == 1);
}

TEST_CASE("with its client elsewhere the server's end is a verdict of its own, a second later", "[server][docket]")
{
    Court court;
    court.docket.take(late_segment());
    court.docket.advance(closed_at + ServerEnds::horizon_ns - 1);
    CHECK(court.rulings.empty());

    SECTION("nobody has met it")
    {
        court.docket.advance(closed_at + ServerEnds::horizon_ns);
        REQUIRE(court.rulings.size() == 1);
        CHECK(court.rulings[0].cause == Cause::closed_on_request);
        CHECK_FALSE(court.rulings[0].client);
        CHECK(court.docket.upstreams().size() == 0);
    }
    SECTION("a client on this host has")
    {
        court.docket.take(in_exchange(EVENT_PEER_RESET, closed_at + ms));
        court.rulings.clear(); // the client's own
        court.docket.advance(closed_at + ServerEnds::horizon_ns);
        for (const Ruling& ruling : court.rulings)
            CHECK(ruling.client);
    }
    SECTION("a connection of the same ports to another address has not")
    {
        event other = in_exchange(EVENT_CLOSED, closed_at + ms);
        ::inet_pton(AF_INET, "10.0.0.9", other.peer_address);
        court.docket.take(other);
        court.docket.advance(closed_at + ServerEnds::horizon_ns);
        REQUIRE(court.rulings.size() == 1);
        CHECK_FALSE(court.rulings[0].client);
    }
}

TEST_CASE("a full accept queue is a verdict at once, and proves what its clients suffer", "[server][docket]")
{
    event overflow{};
    overflow.kind = EVENT_ACCEPT_OVERFLOW;
    overflow.timestamp_ns = 6'000 * ms;
    overflow.family = 4;
    ::inet_pton(AF_INET, "10.0.0.2", overflow.local_address);
    ::inet_pton(AF_INET, "10.0.0.7", overflow.peer_address); // another client's SYN
    overflow.local_port = 8000;
    overflow.accept_queue = 129;
    overflow.turned_away = 3;
    Court court;
    court.docket.take(overflow);
    REQUIRE(court.rulings.size() == 1);
    CHECK(court.rulings[0].cause == Cause::accept_overflow);
    CHECK(court.rulings[0].certainty == Certainty::proven);
    CHECK_FALSE(court.rulings[0].client);
    CHECK(
        judge_server_end(overflow)->message ==
        "The listener turned away 3 connection attempts: 129 connections waited already that no process had accepted.");

    Verdict verdict = lost(Cause::accept_stalled);
    corroborate_with_overflow(verdict, overflow);
    CHECK(verdict.certainty == Certainty::proven);
    CHECK_THAT(verdict.message, Catch::Contains("129 connections waited"));
    verdict = lost(Cause::connect_refused);
    corroborate_with_overflow(verdict, overflow);
    CHECK(verdict.certainty == Certainty::likely);
}

TEST_CASE("a listener has one verdict a second, with all that it has turned away", "[server]")
{
    std::vector<std::uint32_t> counts;
    ServerEnds ends([&](const event& e) { counts.push_back(e.turned_away); });
    const auto turn_away = [&](std::uint64_t at_ns, std::uint32_t count, std::uint16_t port = 8000) {
        event e{};
        e.kind = EVENT_ACCEPT_OVERFLOW;
        e.timestamp_ns = at_ns;
        e.family = 4;
        e.local_port = port;
        e.turned_away = count;
        ends.note_overflow(e);
    };
    turn_away(1'000 * ms, 1);
    CHECK(counts == std::vector<std::uint32_t>{1});
    turn_away(1'100 * ms, 2);
    turn_away(1'999 * ms, 3);
    turn_away(1'999 * ms, 9, 8001); // another listener
    CHECK(counts == std::vector<std::uint32_t>{1, 9});
    turn_away(2'000 * ms, 1);
    CHECK(counts == std::vector<std::uint32_t>{1, 9, 6});
    turn_away(2'500 * ms, 4);
    ends.advance(2'999 * ms);
    CHECK(counts.size() == 3);
    ends.advance(3'000 * ms); // what came last is told as well
    CHECK(counts == std::vector<std::uint32_t>{1, 9, 6, 4});
    ends.advance(9'000 * ms);
    ends.finish();
    CHECK(counts.size() == 4);
}

TEST_CASE("who was turned away is known for as long as it may try again", "[server]")
{
    event overflow = at_server(EVENT_ACCEPT_OVERFLOW);
    overflow.turned_away = 1;
    overflow.timestamp_ns = request_at;
    ServerEnds ends([](const event&) {});
    ends.note_overflow(overflow);
    CHECK(ends.overflow_of(in_exchange(EVENT_CLOSED, request_at - ms)) != nullptr);
    CHECK(ends.overflow_of(in_exchange(EVENT_CLOSED, request_at)) != nullptr);
    CHECK(ends.overflow_of(in_exchange(EVENT_CLOSED, request_at + ServerEnds::patience_ns)) != nullptr);
    CHECK(ends.overflow_of(in_exchange(EVENT_CLOSED, request_at + ServerEnds::patience_ns + 1)) == nullptr);
    event other = in_exchange(EVENT_CLOSED, request_at);
    other.local_port++;
    CHECK(ends.overflow_of(other) == nullptr);
}

TEST_CASE("every network namespace has a loopback of its own", "[server][docket]")
{
    const auto on_loopback = [](event e, std::uint32_t netns) {
        ::inet_pton(AF_INET, "127.0.0.1", e.local_address);
        ::inet_pton(AF_INET, "127.0.0.1", e.peer_address);
        e.netns = netns;
        return e;
    };
    std::vector<event> strangers;
    ServerEnds ends([&](const event& e) { strangers.push_back(e); });
    ends.note(on_loopback(late_segment(), 1));
    ends.meet(on_loopback(crossing(), 2));
    CHECK(ends.of(on_loopback(crossing(), 2)) == nullptr);
    CHECK(ends.of(on_loopback(crossing(), 1)) != nullptr);
    ends.finish();
    CHECK(strangers.size() == 1);

    ends.note(on_loopback(late_segment(), 1));
    ends.meet(on_loopback(crossing(), 1));
    ends.finish();
    CHECK(strangers.size() == 1);
}

TEST_CASE("what the process knew at its close is not overwritten by what came after", "[server]")
{
    ServerEnds ends([](const event&) {});
    event e = at_server(EVENT_LOCAL_FIN);
    e.unread_bytes = 176;
    ends.note(e);
    ends.note(late_segment());
    REQUIRE(ends.of(crossing()) != nullptr);
    CHECK(ends.of(crossing())->unread_bytes == 176);
}

TEST_CASE("a flood of ends is bounded, and none is lost", "[server]")
{
    std::size_t taken = 0;
    ServerEnds ends([&](const event&) { ++taken; });
    constexpr std::size_t flood = ServerEnds::capacity + 10;
    for (std::size_t i = 0; i < flood; ++i) {
        event e = late_segment();
        e.peer_port = static_cast<std::uint16_t>(1024 + i);
        ends.note(e);
    }
    CHECK(taken == 10);
    ends.finish();
    CHECK(taken == flood);
}

TEST_CASE("what a source can't tell of a server's socket is no evidence that it had read all")
{
    event e = closed_unread(0);
    e.connection.flags |= CONNECTION_LOCAL_RESET;
    CHECK(is_server_end(e));
    e.observed = static_cast<std::uint16_t>(e.observed & ~OBSERVED_UNREAD);
    CHECK_FALSE(is_server_end(e));
}
