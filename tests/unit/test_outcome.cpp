// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What became of a failed exchange, by thread and order, just inside and just outside each limit; and the docket, where
// verdicts wait for it.
#include <functional>
#include <vector>

#include <catch2/catch.hpp>

#include "core/docket.h"
#include "core/outcome.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint32_t proxy = 1234; // its process; its threads count from there
constexpr std::uint64_t turn = 20 * ms;

// ---- steps of the proxy, as the kernel tells them

event step(std::uint8_t kind, std::uint64_t at_ns, std::uint32_t thread = proxy)
{
    event e{};
    e.timestamp_ns = at_ns;
    e.kind = kind;
    e.family = 4;
    e.version = FINRACE_EVENT_VERSION;
    e.thread = thread;
    e.turn = 7;
    e.connection.pid = proxy;
    return e;
}

event of_process(event e, std::uint32_t process)
{
    e.connection.pid = process;
    return e;
}

event after_sleep(event e)
{
    e.turn++;
    return e;
}

event released(const event& end, std::uint64_t at_ns, std::uint32_t thread = proxy)
{
    event e = step(EVENT_RELEASED, at_ns, thread);
    e.connection = end.connection;
    e.connection.pid = proxy;
    return e;
}

event tried(std::uint64_t id, std::uint64_t at_ns, std::uint32_t thread = proxy, std::uint32_t request_bytes = 176)
{
    event e = step(EVENT_TRIED, at_ns, thread);
    ::inet_pton(AF_INET, "10.0.0.3", e.peer_address);
    e.peer_port = 8001;
    e.request_bytes = request_bytes;
    e.connection.id = id;
    return e;
}

/// A client's request came at `asked_ns`; before the exchange's own, by default.
event client_step(std::uint8_t kind, std::uint16_t port, std::uint64_t at_ns, std::uint32_t thread = proxy,
                  std::uint64_t asked_ns = request_at - ms)
{
    event e = step(kind, at_ns, thread);
    ::inet_pton(AF_INET, "192.0.2.7", e.peer_address);
    e.peer_port = port;
    e.old_state = e.new_state = TCP_STATE_ESTABLISHED;
    e.connection.last_byte_ns = asked_ns;
    e.connection.flags = CONNECTION_CLIENT_WAITS;
    return e;
}

event answered(std::uint16_t port, std::uint64_t at_ns, std::uint16_t status = 502, std::uint32_t thread = proxy)
{
    event e = client_step(EVENT_CLIENT_ANSWERED, port, at_ns, thread);
    e.http_status = status;
    return e;
}

event let_go(std::uint16_t port, std::uint64_t at_ns, std::uint32_t flags, std::uint32_t thread = proxy)
{
    event e = client_step(EVENT_CLIENT_RELEASED, port, at_ns, thread);
    e.new_state = TCP_STATE_CLOSE_WAIT;
    e.connection.flags = flags;
    return e;
}

Outcomes told(const std::vector<event>& steps)
{
    Outcomes outcomes;
    for (const event& e : steps)
        outcomes.note(e);
    return outcomes;
}

const event lost = crossing(); // its FIN came at request_at + 20.113 ms
const std::uint64_t failed_at = lost.connection.peer_fin_ns;
const std::uint64_t let_go_at = failed_at + ms;

/// This host ended its unanswered exchange, at request_at + 1 s.
event local_close()
{
    event e = in_exchange(EVENT_LOCAL_FIN, request_at + 1000 * ms);
    e.new_state = TCP_STATE_FIN_WAIT1;
    e.connection.flags |= CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN | CONNECTION_SOCKET_CLOSED;
    e.connection.local_close_ns = e.timestamp_ns;
    return e;
}

} // namespace

// ------------------------------------------------------------------------------------------------------- one's turn

TEST_CASE("the client that the same thread answers next is the exchange's", "[outcome]")
{
    for (const std::uint64_t after : {std::uint64_t{0}, turn - 1}) {
        CAPTURE(after);
        const Outcomes outcomes = told({released(lost, let_go_at), answered(4000, let_go_at + after)});
        const Outcome outcome = outcomes.by_turn(lost);
        REQUIRE(outcome.client);
        CHECK(outcome.settled);
        CHECK(outcome.known);
        CHECK(!outcome.retry);
        CHECK(outcome.client->port == 4000);
        CHECK(outcome.client->address[3] == 7);
        CHECK(outcome.client->status == 502);
        CHECK(outcome.client->answered);
        CHECK(!outcome.client->left);
        CHECK(outcome.client->certainty == Certainty::likely);
    }
    SECTION("later, or after it has slept, it may be another's: possible")
    {
        for (const event& e : {answered(4000, let_go_at + turn), after_sleep(answered(4000, let_go_at + 1))}) {
            const Outcomes outcomes = told({released(lost, let_go_at), e});
            CHECK(!outcomes.by_turn(lost).client);
            REQUIRE(outcomes.of(lost).client);
            CHECK(outcomes.of(lost).client->certainty == Certainty::possible);
            CHECK(!outcomes.of(lost).settled);
        }
    }
    SECTION("another thread")
    {
        const Outcomes outcomes = told({released(lost, let_go_at), answered(4000, let_go_at + 1, 502, proxy + 1)});
        CHECK(!outcomes.by_turn(lost).client);
        REQUIRE(outcomes.of(lost).client);
        CHECK(outcomes.of(lost).client->certainty == Certainty::possible);
    }
    SECTION("another process")
    {
        const Outcomes outcomes =
            told({released(lost, let_go_at), of_process(answered(4000, let_go_at + 1), proxy + 1)});
        CHECK(!outcomes.of(lost).client);
        CHECK(!outcomes.of(lost).known);
    }
    SECTION("with an upstream's answer: another client")
    {
        const Outcomes outcomes = told({released(lost, let_go_at), answered(4000, let_go_at + 1, 200),
                                        let_go(4001, let_go_at + 2, 0), answered(4002, let_go_at + 3, 502)});
        REQUIRE(outcomes.by_turn(lost).client);
        CHECK(outcomes.by_turn(lost).client->port == 4002);
        CHECK(!told({released(lost, let_go_at), answered(4000, let_go_at + turn, 200)}).of(lost).client);
    }
    SECTION("its socket was never let go of")
    {
        CHECK(!told({answered(4000, let_go_at)}).of(lost).client);
        event other = lost;
        other.connection.id++;
        CHECK(!told({released(other, let_go_at), answered(4000, let_go_at)}).of(lost).client);
    }
}

TEST_CASE("a client whose request came after the exchange's is another's", "[outcome]")
{
    const auto asked = [](std::uint64_t at_ns) {
        event e = answered(4000, let_go_at + 1);
        e.connection.last_byte_ns = at_ns;
        return told({released(lost, let_go_at), e}).of(lost).client.has_value();
    };
    CHECK(asked(request_at));
    CHECK(!asked(request_at + 1));
    // Without a request it is the SYN that says when.
    event open = refused();
    const auto asked_open = [&](std::uint64_t at_ns) {
        event e = answered(4000, open.timestamp_ns + 1);
        e.connection.last_byte_ns = at_ns;
        return told({released(open, open.timestamp_ns), e}).of(open).client.has_value();
    };
    CHECK(asked_open(open.connection.opened_ns));
    CHECK(!asked_open(open.connection.opened_ns + 1));
}

TEST_CASE("a client that is answered before the upstream's socket is let go of", "[outcome]")
{
    const auto found = [](const event& end, const event& before) {
        return told({before, released(end, end.timestamp_ns + ms)}).by_turn(end).client.has_value();
    };
    SECTION("an error, or what can't be read, once the upstream had ended")
    {
        CHECK(found(lost, answered(4000, failed_at, 502)));
        CHECK(found(lost, answered(4000, failed_at, 400)));
        CHECK(found(lost, answered(4000, failed_at, 0)));
        CHECK(!found(lost, answered(4000, failed_at, 399)));
        event gone = answered(4000, failed_at, 200); // Caddy answers who has left
        gone.new_state = TCP_STATE_CLOSE_WAIT;
        CHECK(found(lost, gone));
        CHECK(!found(lost, answered(4000, failed_at - 1, 502)));
        CHECK(!found(lost, after_sleep(answered(4000, failed_at, 502))));
    }
    SECTION("where this host ended, any within the turn")
    {
        const event end = local_close();
        const std::uint64_t release = end.timestamp_ns + ms;
        CHECK(found(end, answered(4000, release - turn, 504)));
        CHECK(!found(end, answered(4000, release - turn - 1, 504)));
    }
    SECTION("let go of, if it waited")
    {
        CHECK(found(lost, let_go(4000, failed_at, CONNECTION_CLIENT_WAITS)));
        CHECK(!found(lost, let_go(4000, failed_at, 0)));
    }
    SECTION("of several, the one whose request came right before the exchange's: possible")
    {
        const auto client = [](std::uint16_t port, std::uint64_t asked_ns, std::uint64_t at_ns) {
            event e = client_step(EVENT_CLIENT_ANSWERED, port, at_ns, proxy, asked_ns);
            e.http_status = 504;
            return e;
        };
        const Outcome outcome =
            told({client(4000, request_at - 1, failed_at), client(4001, request_at - 2, failed_at + 1),
                  client(4002, request_at + 1, failed_at + 2), released(lost, let_go_at)})
                .by_turn(lost);
        REQUIRE(outcome.client);
        CHECK(outcome.client->port == 4000);
        CHECK(outcome.client->certainty == Certainty::possible);
        CHECK(outcome.settled);
        const Outcome again = told({client(4000, request_at, failed_at), client(4000, request_at, failed_at + 1),
                                    released(lost, let_go_at)})
                                  .by_turn(lost);
        REQUIRE(again.client);
        CHECK(again.client->certainty == Certainty::likely);
    }
    SECTION("told of late, in its place all the same")
    {
        const Outcome outcome =
            told({released(lost, let_go_at), answered(4001, let_go_at + 1), answered(4000, failed_at)}).by_turn(lost);
        REQUIRE(outcome.client);
        CHECK(outcome.client->port == 4000);
    }
}

TEST_CASE("several exchanges end in one turn", "[outcome]")
{
    // Two that this host ends; the second one's request, and its client's, came a little later.
    const event first = local_close();
    event second = local_close();
    second.connection.id = first.connection.id + 1;
    second.connection.request_ns += 2 * ms;
    const std::uint64_t at = first.timestamp_ns + ms;
    const auto of_first = [](std::uint64_t when) { return answered(4000, when, 504); };
    const auto of_second = [](std::uint64_t when) {
        event e = client_step(EVENT_CLIENT_ANSWERED, 4001, when, proxy, request_at + ms);
        e.http_status = 504;
        return e;
    };
    const auto named = [](const Outcome& outcome, std::uint16_t port, Certainty certainty) {
        REQUIRE(outcome.client);
        CHECK(outcome.client->port == port);
        CHECK(outcome.client->certainty == certainty);
    };

    SECTION("each is let go of, then its client is answered (nginx)")
    {
        const Outcomes outcomes =
            told({released(first, at), of_first(at + 1), released(second, at + 2), of_second(at + 3)});
        named(outcomes.by_turn(first), 4000, Certainty::likely);
        named(outcomes.by_turn(second), 4001, Certainty::likely);
        const Outcomes unanswered = told({released(first, at), of_first(at + 1), released(second, at + 2)});
        CHECK(!unanswered.by_turn(second).client);
        // A turn may be long: its beginning is asked for further back than a client is.
        const Outcomes slow = told({released(first, at), of_first(at + turn / 2), released(second, at + turn + 1)});
        CHECK(!slow.by_turn(second).client);
    }
    SECTION("each client is answered, then its upstream let go of (HAProxy)")
    {
        const Outcomes outcomes =
            told({of_first(at), released(first, at + 1), of_second(at + 2), released(second, at + 3)});
        named(outcomes.by_turn(first), 4000, Certainty::likely);
        named(outcomes.by_turn(second), 4001, Certainty::likely);
        const Outcomes unanswered = told({of_first(at), released(first, at + 1), released(second, at + 2)});
        CHECK(!unanswered.by_turn(second).client);
        const Outcomes later_first =
            told({of_second(at), released(second, at + 1), of_first(at + 2), released(first, at + 3)});
        named(later_first.by_turn(first), 4000, Certainty::likely);
        named(later_first.by_turn(second), 4001, Certainty::likely);
    }
    SECTION("two clients had asked before either exchange was begun: which is whose, the times don't tell")
    {
        event early = client_step(EVENT_CLIENT_ANSWERED, 4001, at + 2, proxy, request_at - ms / 2);
        early.http_status = 504;
        const Outcomes outcomes = told({of_first(at), released(first, at + 1), early, released(second, at + 3)});
        named(outcomes.by_turn(first), 4001, Certainty::possible);
        named(outcomes.by_turn(second), 4001, Certainty::possible);
        const Outcomes swapped = told({early, released(first, at + 3), of_first(at + 4), released(second, at + 5)});
        named(swapped.by_turn(first), 4001, Certainty::possible);
    }
    SECTION("another client of the process asked later, and still before the request: possible, and that one")
    {
        const Outcomes outcomes = told({of_first(at), released(second, at + 1), after_sleep(of_second(at + 30 * ms))});
        named(outcomes.by_turn(second), 4001, Certainty::possible);
        CHECK(!outcomes.by_turn(second).known);
    }
    SECTION("in both orders (Node.js): possible")
    {
        event third = local_close();
        third.connection.id = first.connection.id + 2;
        const Outcomes outcomes = told({answered(4002, at), released(third, at + 1), released(first, at + 2),
                                        of_first(at + 3), released(second, at + 4), of_second(at + 5)});
        REQUIRE(outcomes.by_turn(second).client);
        CHECK(outcomes.by_turn(second).client->certainty == Certainty::possible);
    }
    SECTION("a client that had asked long before the request was begun: possible")
    {
        const auto of_client = [&](std::uint64_t asked_ns) {
            event e = client_step(EVENT_CLIENT_ANSWERED, 4000, at + 1, proxy, asked_ns);
            e.http_status = 504;
            return told({released(first, at), e}).by_turn(first);
        };
        named(of_client(request_at - 20 * ms), 4000, Certainty::likely);
        CHECK(of_client(request_at - 20 * ms).known);
        named(of_client(request_at - 20 * ms - 1), 4000, Certainty::possible);
        CHECK(!of_client(request_at - 20 * ms - 1).known);
        // The handshake is the request's own time.
        event opened = first;
        opened.connection.exchange = 1;
        opened.connection.opened_ns = request_at - 30 * ms;
        event e = client_step(EVENT_CLIENT_ANSWERED, 4000, at + 1, proxy, request_at - 50 * ms);
        e.http_status = 504;
        named(told({released(opened, at), e}).by_turn(opened), 4000, Certainty::likely);
    }
    SECTION("all upstreams, then all clients: by the requests' times, possible")
    {
        const Outcomes outcomes =
            told({released(first, at), released(second, at + 1), of_second(at + 2), of_first(at + 3)});
        named(outcomes.by_turn(first), 4000, Certainty::possible);
        named(outcomes.by_turn(second), 4001, Certainty::possible);
    }
    SECTION("all clients, then all upstreams: the same (lighttpd)")
    {
        const Outcomes outcomes =
            told({of_second(at), of_first(at + 1), released(first, at + 2), released(second, at + 3)});
        named(outcomes.by_turn(second), 4001, Certainty::possible);
    }
}

TEST_CASE("a client that left", "[outcome]")
{
    for (const std::uint8_t state : {TCP_STATE_CLOSE_WAIT, TCP_STATE_LAST_ACK, TCP_STATE_CLOSING, TCP_STATE_CLOSE,
                                     TCP_STATE_ESTABLISHED, TCP_STATE_FIN_WAIT1, TCP_STATE_FIN_WAIT2}) {
        CAPTURE(state);
        event e = let_go(4000, let_go_at + 1, CONNECTION_CLIENT_WAITS);
        e.new_state = state;
        const Outcome outcome = told({released(lost, let_go_at), e}).by_turn(lost);
        REQUIRE(outcome.client);
        CHECK(!outcome.client->answered);
        CHECK(outcome.client->left ==
              (state != TCP_STATE_ESTABLISHED && state != TCP_STATE_FIN_WAIT1 && state != TCP_STATE_FIN_WAIT2));
    }
}

// ----------------------------------------------------------------------------------------------------------- a retry

TEST_CASE("the thread's next request is a retry", "[outcome]")
{
    const event again = tried(99, let_go_at + 2 * ms);
    SECTION("told so, and its client's answer afterwards")
    {
        const Outcomes outcomes =
            told({released(lost, let_go_at), again, answered(4000, let_go_at + 300 * ms, 200, proxy + 1)});
        CHECK(!outcomes.by_turn(lost).settled);
        const Outcome outcome = outcomes.of(lost);
        REQUIRE(outcome.retry);
        CHECK(outcome.known);
        CHECK(outcome.retry->connection_id == 99);
        CHECK(outcome.retry->after_ns == 2 * ms);
        CHECK(outcome.retry->upstream.port == 8001);
        CHECK(outcome.retry->upstream.address[3] == 3);
        REQUIRE(outcome.client);
        CHECK(outcome.client->status == 200);
        CHECK(outcome.client->certainty == Certainty::possible);
    }
    SECTION("what was answered in between is another client's")
    {
        const Outcomes outcomes =
            told({released(lost, let_go_at), answered(4000, let_go_at + ms, 200, proxy + 1), again});
        const Outcome outcome = outcomes.of(lost);
        CHECK(outcome.retry);
        CHECK(!outcome.client);
    }
    SECTION("not another request's, but then the thread has gone on with other work")
    {
        for (const std::uint32_t bytes : {175U, 177U}) {
            const Outcomes outcomes = told({released(lost, let_go_at), tried(99, let_go_at + 1, proxy, bytes),
                                            answered(4000, let_go_at + 2), answered(4001, let_go_at + 3)});
            CHECK(!outcomes.by_turn(lost).settled);
            const Outcome outcome = outcomes.of(lost);
            CHECK(!outcome.known);
            CHECK(!outcome.retry);
            REQUIRE(outcome.client);
            CHECK(outcome.client->port == 4000);
            CHECK(outcome.client->certainty == Certainty::possible);
        }
    }
    SECTION("over a connection opened for it, once the request is in it")
    {
        const auto open_then = [](std::uint64_t id, std::uint32_t bytes) {
            return told({released(lost, let_go_at), tried(99, let_go_at + 1, proxy, 0),
                         after_sleep(tried(id, let_go_at + 30 * ms, proxy, bytes))})
                .of(lost);
        };
        REQUIRE(open_then(99, 176).retry);
        CHECK(open_then(99, 176).retry->after_ns == 1);
        CHECK(!open_then(99, 175).retry);
        CHECK(!open_then(98, 176).retry);
        CHECK(!open_then(99, 0).retry);
    }
    SECTION("after a connection that did not open, another one")
    {
        const event open = refused();
        const auto then = [&open](std::uint32_t bytes) {
            return told({released(open, open.timestamp_ns), tried(99, open.timestamp_ns + 1, proxy, bytes)})
                .of(open)
                .retry.has_value();
        };
        CHECK(then(0));
        CHECK(!then(176)); // whose request that is can't be told
    }
    SECTION("not another thread's")
    {
        CHECK(!told({released(lost, let_go_at), tried(99, let_go_at + 1, proxy + 1)}).of(lost).known);
    }
    SECTION("not in another turn")
    {
        CHECK(told({released(lost, let_go_at), tried(99, let_go_at + turn - 1)}).of(lost).retry);
        CHECK(!told({released(lost, let_go_at), tried(99, let_go_at + turn)}).of(lost).known);
        CHECK(!told({released(lost, let_go_at), after_sleep(tried(99, let_go_at + 1))}).of(lost).known);
    }
    SECTION("not the lost one itself")
    {
        CHECK(!told({released(lost, let_go_at), tried(lost.connection.id, let_go_at + 1)}).of(lost).known);
    }
    SECTION("not if its client is answered in the same turn: it was another's, of the same size")
    {
        const Outcomes outcomes = told({released(lost, let_go_at), again, answered(4000, let_go_at + 3 * ms)});
        const Outcome outcome = outcomes.of(lost);
        CHECK(!outcome.retry);
        CHECK(!outcome.known);
        REQUIRE(outcome.client);
        CHECK(outcome.client->certainty == Certainty::possible);
    }
    SECTION("but if the retry itself was lost at once, its answer comes after that")
    {
        event failed = tried(99, let_go_at + 3 * ms);
        CHECK(told({released(lost, let_go_at), again, released(failed, let_go_at + 3 * ms),
                    answered(4000, let_go_at + 4 * ms)})
                  .of(lost)
                  .retry);
    }
    SECTION("not after the client had its answer")
    {
        const Outcome outcome = told({released(lost, let_go_at), answered(4000, let_go_at + 1), again}).of(lost);
        CHECK(!outcome.retry);
        CHECK(outcome.known);
        CHECK(outcome.client->port == 4000);
    }
}

TEST_CASE("by process, one client alone", "[outcome]")
{
    const std::uint32_t other = proxy + 1;
    const event one = answered(4000, let_go_at + 5 * ms, 502, other);
    CHECK(told({released(lost, let_go_at), one}).of(lost).client);
    SECTION("twice the same")
    {
        const Outcome outcome =
            told({released(lost, let_go_at), one, let_go(4000, let_go_at + 6 * ms, CONNECTION_CLIENT_WAITS, other)})
                .of(lost);
        REQUIRE(outcome.client);
        CHECK(outcome.client->answered);
    }
    SECTION("two")
    {
        CHECK(!told({released(lost, let_go_at), one, answered(4001, let_go_at + 6 * ms, 502, other)}).of(lost).client);
        event elsewhere = one;
        elsewhere.netns++;
        CHECK(!told({released(lost, let_go_at), one, elsewhere}).of(lost).client);
    }
    SECTION("one that came later, or had its answer long before, is none")
    {
        event late = answered(4001, let_go_at + 6 * ms, 200, other);
        late.connection.last_byte_ns = request_at + 1;
        CHECK(told({released(lost, let_go_at), one, late}).of(lost).client);
        CHECK(told({released(lost, let_go_at), one, let_go(4001, let_go_at + 6 * ms, 0, other)}).of(lost).client);
        CHECK(told({answered(4001, failed_at - 1, 200, other), released(lost, let_go_at), one}).of(lost).client);
    }
}

TEST_CASE("more of an answer is no other answer", "[outcome]")
{
    // Its client may have closed since; when it had asked is then known to a tick.
    const auto told_twice = [](std::uint64_t apart_ns, std::uint32_t flags) {
        const event first = client_step(EVENT_CLIENT_ANSWERED, 4001, failed_at - apart_ns, proxy + 1, request_at + 1);
        event more = client_step(EVENT_CLIENT_ANSWERED, 4001, failed_at, proxy + 1);
        more.connection.flags = flags;
        return told({first, released(lost, let_go_at), more}).of(lost).client.has_value();
    };
    CHECK(!told_twice(10 * ms, 0));
    CHECK(told_twice(10 * ms + 1, 0));
    CHECK(told_twice(10 * ms, CONNECTION_CLIENT_WAITS));
}

TEST_CASE("what is old is forgotten", "[outcome]")
{
    const std::uint64_t last_moment = let_go_at + 2 * Outcomes::horizon_ns;
    Outcomes outcomes = told({released(lost, let_go_at), answered(4000, let_go_at + 1)});
    outcomes.note(answered(4001, last_moment));
    CHECK(outcomes.by_turn(lost).client);
    outcomes.note(answered(4002, last_moment + 1));
    CHECK(!outcomes.by_turn(lost).client);

    SECTION("and what is too much")
    {
        Outcomes flooded = told({released(lost, let_go_at), answered(4000, let_go_at)});
        for (int i = 0; i < 4094; ++i)
            flooded.note(answered(4001, let_go_at + 1));
        CHECK(flooded.by_turn(lost).client);
        flooded.note(answered(4001, let_go_at + 1));
        CHECK(!flooded.by_turn(lost).client);
    }
}

// --------------------------------------------------------------------------------------------------------- the docket

namespace {

struct Delivered {
    event e;
    event last;
    Classification classification;
    Outcome outcome;
};

class Court {
public:
    explicit Court(bool tells_outcomes = true)
        : docket(tells_outcomes, [this](const Judged& judged) {
              if (judged.benched != nullptr)
                  on_benched(judged);
              delivered.push_back({judged.e, judged.last, judged.classification, judged.outcome});
          })
    {
    }

    void take(const std::vector<event>& events)
    {
        for (const event& e : events)
            docket.take(e);
    }
    [[nodiscard]] std::vector<Cause> causes() const
    {
        std::vector<Cause> all;
        for (const Delivered& one : delivered)
            if (one.classification.verdict)
                all.push_back(one.classification.verdict->cause);
        return all;
    }
    [[nodiscard]] UpstreamCounts counts() const
    {
        UpstreamCounts of_one;
        docket.upstreams().for_each([&](const UpstreamKey*, const Upstream& upstream) { of_one = upstream.counts; });
        return of_one;
    }
    [[nodiscard]] std::uint64_t counted(Cause cause) const
    {
        const UpstreamCounts all = counts();
        const auto found = all.verdicts.find(cause);
        return found == all.verdicts.end() ? 0 : found->second;
    }
    [[nodiscard]] std::uint64_t unclassified() const { return counts().unclassified; }

    std::vector<Delivered> delivered;
    std::function<void(const Judged&)> on_benched;
    Docket docket;
};

event closed_after(const event& local_fin)
{
    event e = local_fin;
    e.kind = EVENT_CLOSED;
    e.timestamp_ns += 40 * ms;
    e.old_state = TCP_STATE_FIN_WAIT2;
    e.new_state = TCP_STATE_CLOSE;
    e.connection.flags |= CONNECTION_PEER_FIN;
    e.connection.peer_fin_ns = e.timestamp_ns;
    return e;
}

} // namespace

TEST_CASE("a verdict waits for its outcome, half a second at most", "[docket]")
{
    Court court;
    court.take({lost});
    CHECK(court.delivered.empty());
    CHECK(court.counted(Cause::keepalive_race) == 1);

    SECTION("until it is known")
    {
        court.take({released(lost, let_go_at), answered(4000, let_go_at + 1)});
        court.docket.advance(let_go_at + turn - 1);
        CHECK(court.delivered.empty()); // what the turn still brings may tell otherwise
        court.docket.advance(let_go_at + turn + 10 * ms);
        REQUIRE(court.delivered.size() == 1);
        CHECK(court.delivered[0].outcome.client->port == 4000);
    }
    SECTION("until it is time")
    {
        court.docket.advance(lost.timestamp_ns + Docket::wait_ns - 1);
        CHECK(court.delivered.empty());
        court.docket.advance(lost.timestamp_ns + Docket::wait_ns);
        REQUIRE(court.delivered.size() == 1);
        CHECK(!court.delivered[0].outcome.client);
    }
    SECTION("until all ends")
    {
        court.docket.finish();
        CHECK(court.delivered.size() == 1);
    }
    SECTION("and the connection goes on meanwhile")
    {
        court.take({crossing_closed()});
        court.docket.finish();
        REQUIRE(court.delivered.size() == 1);
        CHECK(court.delivered[0].e.kind == EVENT_PEER_FIN);
        CHECK(court.delivered[0].last.kind == EVENT_CLOSED);
    }
    CHECK(court.causes() == std::vector{Cause::keepalive_race});
    CHECK(court.counted(Cause::keepalive_race) == 1);
}

TEST_CASE("nothing waits where no outcome is told, nor what is harmless", "[docket]")
{
    Court court(false);
    court.take({lost});
    CHECK(court.causes() == std::vector{Cause::keepalive_race});

    Court healthy;
    event idle = crossing();
    idle.connection.fin_unacked = idle.unacked_bytes = 0;
    idle.response_bytes = 100;
    idle.bytes_received = 100;
    idle.connection.fin_idle_ms = 5000;
    healthy.take({idle});
    event end = idle;
    end.kind = EVENT_CLOSED;
    end.timestamp_ns += ms;
    healthy.take({end});
    REQUIRE(healthy.delivered.size() == 1);
    CHECK(healthy.delivered[0].classification.ending == Ending::idle_close_by_peer);
}

TEST_CASE("this host's own close is judged by what the client got, once", "[docket]")
{
    const event end = local_close();
    const event closed = closed_after(end);
    const std::vector<event> timeout{released(end, end.timestamp_ns - 1000), end,
                                     answered(4000, end.timestamp_ns, 504)};
    Court court;

    SECTION("before the end comes")
    {
        court.take(timeout);
        court.docket.advance(end.timestamp_ns + turn);
        CHECK(court.causes() == std::vector{Cause::proxy_timeout});
        court.take({closed});
        court.docket.finish();
        CHECK(court.delivered.size() == 1);
    }
    SECTION("after the end has come")
    {
        court.take(timeout);
        court.take({closed});
        CHECK(court.delivered.empty());
        court.docket.advance(closed.timestamp_ns);
        REQUIRE(court.delivered.size() == 1);
        CHECK(court.delivered[0].e.kind == EVENT_LOCAL_FIN);
    }
    SECTION("from the end alone: an RST, or the other event was lost")
    {
        event alone = closed;
        alone.connection.lost_events = 1;
        alone.connection.lost_kinds = 1U << EVENT_LOCAL_FIN;
        court.take({released(end, end.timestamp_ns - 1000), answered(4000, end.timestamp_ns, 504), alone});
        court.docket.finish();
        CHECK(court.delivered.size() == 1);
    }
    CHECK(court.causes() == std::vector{Cause::proxy_timeout});
    CHECK(court.counted(Cause::proxy_timeout) == 1);
    CHECK(court.unclassified() == 0);
}

TEST_CASE("without an outcome this host's own close is unclassified, once", "[docket]")
{
    const event end = local_close();
    Court court;
    court.take({released(end, end.timestamp_ns - 1000), end});
    SECTION("the end comes meanwhile")
    {
        court.take({closed_after(end)});
    }
    SECTION("the end comes later")
    {
        court.docket.advance(end.timestamp_ns + Docket::wait_ns);
        CHECK(court.delivered.empty());
        court.take({closed_after(end)});
    }
    court.docket.finish();
    REQUIRE(court.delivered.size() == 1);
    CHECK(court.delivered[0].classification.ending == Ending::unclassified);
    CHECK(court.unclassified() == 1);
}

TEST_CASE("beyond its capacity the docket lets the oldest go", "[docket]")
{
    Court court;
    event e = lost;
    for (std::size_t i = 0; i < Docket::capacity; ++i) {
        e.connection.id = i + 1;
        court.take({e});
    }
    CHECK(court.delivered.empty());
    e.connection.id++;
    court.take({e});
    REQUIRE(court.delivered.size() == 1);
    CHECK(court.delivered[0].e.connection.id == 1);
    court.docket.finish();
    CHECK(court.delivered.size() == Docket::capacity + 1);
}

TEST_CASE("a connection that waits twice may have its later end settled first", "[docket]")
{
    Court court;
    event later = lost;
    later.timestamp_ns += 10 * Docket::wait_ns;
    court.take({later, lost});
    court.docket.advance(lost.timestamp_ns + Docket::wait_ns);
    CHECK(court.delivered.size() == 1);
    court.docket.finish();
    CHECK(court.delivered.size() == 2);
}

// ---------------------------------------------------------------------------------------------- secondary failures

TEST_CASE("an error without an attempt is tied to the failure before it", "[docket][benched]")
{
    event failure = lost;
    failure.connection.pid = proxy;
    const auto untried = [&](std::uint64_t after_ns, std::uint16_t status = 502, std::uint32_t count = 1) {
        event e = answered(4001, failure.timestamp_ns + after_ns, status);
        e.connection.flags |= CONNECTION_UNTRIED;
        e.untried = count;
        return e;
    };
    std::vector<Benched> found;
    std::vector<Verdict> verdicts;
    Court court;
    court.on_benched = [&](const Judged& judged) {
        found.push_back(*judged.benched);
        verdicts.push_back(*judged.classification.verdict);
        CHECK(judged.outcome.client->port == 4001);
        CHECK(judged.e.timestamp_ns == judged.benched->answer.timestamp_ns);
        CHECK(judged.e.connection.id == failure.connection.id);
    };
    SECTION("told of before the failure has its name")
    {
        court.take({failure, untried(2 * ms)});
        court.docket.advance(failure.timestamp_ns + Docket::wait_ns);
        CHECK(found.empty());
        court.docket.advance(failure.timestamp_ns + 2 * ms + Benches::wait_ns);
        REQUIRE(found.size() == 1);
        CHECK(found[0].cause == Cause::keepalive_race);
        CHECK(verdicts[0].cause == Cause::upstream_benched);
        CHECK(verdicts[0].certainty == Certainty::likely);
        CHECK(court.counted(Cause::upstream_benched) == 1);
        CHECK(court.counted(Cause::keepalive_race) == 1);
    }
    SECTION("a 503 may be a refusal of the proxy's own")
    {
        court.take({failure, untried(2 * ms, 503, 7)});
        court.docket.finish();
        REQUIRE(verdicts.size() == 1);
        CHECK(verdicts[0].certainty == Certainty::possible);
        CHECK(verdicts[0].message.find("7 clients got 503") == 0);
    }
    SECTION("a minute after the failure an error is tied to nothing")
    {
        court.take({failure});
        court.docket.advance(failure.timestamp_ns + Docket::wait_ns);
        court.take(
            {untried(FINRACE_ASIDE_MOST_NS - ms), untried(FINRACE_ASIDE_MOST_NS), untried(FINRACE_ASIDE_MOST_NS + 1)});
        court.docket.finish();
        CHECK(found.size() == 2);
    }
    SECTION("nothing failed in that process")
    {
        failure.connection.pid = proxy + 1;
        court.take({failure, untried(ms)});
        court.docket.finish();
        CHECK(found.empty());
    }
    SECTION("nothing had failed yet")
    {
        event before = untried(0);
        before.timestamp_ns--;
        court.take({failure, before});
        court.docket.finish();
        CHECK(found.empty());
    }
    SECTION("with another upstream the process goes on, and goes on losing")
    {
        Benches benches([&](const Benched& benched) { found.push_back(benched); });
        event other = failure;
        other.peer_port++;
        benches.note_loss(failure, Cause::connect_refused);
        benches.note_answer(untried(10 * ms));
        other.timestamp_ns += 300 * ms;
        benches.note_loss(other, Cause::connect_refused);
        benches.note_answer(untried(310 * ms));
        benches.finish();
        REQUIRE(found.size() == 2);
        CHECK(found[0].loss.peer_port == failure.peer_port);
        CHECK(found[0].answer.timestamp_ns == failure.timestamp_ns + 10 * ms);
        CHECK(found[1].loss.peer_port == other.peer_port);
    }
    SECTION("a client's leaving sets nothing aside")
    {
        Benches benches([&](const Benched& benched) { found.push_back(benched); });
        benches.note_loss(failure, Cause::client_abort);
        benches.note_answer(untried(ms));
        benches.finish();
        CHECK(found.empty());
    }
}

// ------------------------------------------------------------------------------------------ whose fault it was

TEST_CASE("proxy_timeout and client_abort, and what is neither", "[outcome][classify]")
{
    event end = local_close();
    const Upstream upstream;
    const auto judged = [&](const std::vector<event>& steps) {
        std::vector<event> all{released(end, end.timestamp_ns)};
        all.insert(all.end(), steps.begin(), steps.end());
        return classify(end, upstream, told(all).of(end));
    };
    const auto is = [](const Classification& c, Cause cause, Certainty certainty) {
        REQUIRE(c.verdict);
        CHECK(c.verdict->cause == cause);
        CHECK(c.verdict->certainty == certainty);
    };
    const std::uint64_t next = end.timestamp_ns + 1;
    const auto left = [](event e) {
        e.new_state = TCP_STATE_CLOSE_WAIT;
        return e;
    };

    CHECK(depends_on_outcome(end));
    is(judged({answered(4000, next, 504)}), Cause::proxy_timeout, Certainty::likely);
    is(judged({answered(4000, next, 500)}), Cause::proxy_timeout, Certainty::likely);
    is(judged({answered(4000, next, 0)}), Cause::proxy_timeout, Certainty::likely);
    is(judged({answered(4000, next, 499)}), Cause::proxy_timeout, Certainty::possible);
    is(judged({answered(4000, next, 504, proxy + 1)}), Cause::proxy_timeout, Certainty::possible);
    is(judged({tried(99, next), answered(4000, next + 2, 200)}), Cause::proxy_timeout, Certainty::possible);
    is(judged({let_go(4000, next, CONNECTION_CLIENT_WAITS)}), Cause::client_abort, Certainty::likely);
    is(judged({let_go(4000, next, CONNECTION_CLIENT_WAITS, proxy + 1)}), Cause::client_abort, Certainty::possible);
    is(judged({left(answered(4000, next, 400))}), Cause::client_abort, Certainty::likely);
    is(judged({left(answered(4000, next, 499))}), Cause::client_abort, Certainty::likely);
    is(judged({left(answered(4000, next, 500))}), Cause::proxy_timeout, Certainty::likely); // it had not noticed
    // So soon it has not waited: whom the process answers then had asked for something else.
    const auto judged_after = [&](std::uint64_t waited_ns, std::uint16_t status) {
        event soon = end;
        soon.timestamp_ns = soon.connection.local_close_ns = request_at + waited_ns;
        return classify(
            soon, upstream,
            told({released(soon, soon.timestamp_ns), answered(4000, soon.timestamp_ns + 1, status)}).of(soon));
    };
    is(judged_after(500 * ms, 408), Cause::proxy_timeout, Certainty::possible);
    CHECK(!judged_after(499 * ms, 408).verdict);
    is(judged_after(499 * ms, 504), Cause::proxy_timeout, Certainty::likely);
    // Neither answered nor left: the proxy itself went.
    event dropped = let_go(4000, next, CONNECTION_CLIENT_WAITS);
    dropped.new_state = TCP_STATE_ESTABLISHED;
    CHECK(!judged({dropped}).verdict);
    CHECK(!judged({}).verdict);

    SECTION("after shutdown(), with nothing acknowledged: the path's, once the client was told so")
    {
        end.connection.flags &= ~static_cast<std::uint32_t>(CONNECTION_SOCKET_CLOSED);
        end.connection.flags |= CONNECTION_SHUTDOWN_UNACKED;
        end.unacked_bytes = end.request_bytes;
        end.retransmits = 3;
        is(judged({answered(4000, next, 503)}), Cause::path_dropped, Certainty::likely);
        is(judged({let_go(4000, next, CONNECTION_CLIENT_WAITS)}), Cause::client_abort, Certainty::likely);
        CHECK(!judged({}).verdict); // it may wait still
    }

    // An exchange that had begun to be answered, and one that was the farewell of TLS, do not depend on it.
    event answered_already = end;
    answered_already.response_bytes = 10;
    answered_already.bytes_received = 10;
    CHECK(!depends_on_outcome(answered_already));
    event farewell = end;
    farewell.request_bytes = FINRACE_TLS_FAREWELL_BYTES;
    CHECK(!depends_on_outcome(farewell));
    CHECK(!depends_on_outcome(lost));
    event server_side = end;
    server_side.connection.flags &= ~static_cast<std::uint32_t>(CONNECTION_CLIENT);
    CHECK(!depends_on_outcome(server_side));
}
