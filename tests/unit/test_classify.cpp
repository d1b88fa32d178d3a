// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Each cause and variant, just inside and just outside each of its boundaries; what was lost; what is older than the
// tracer; and random lives, of which none may end twice or get a verdict where nothing failed. Every event here comes
// out of bpf/connection.h, driven as a backend drives it.
#include <catch2/catch.hpp>

#include <cerrno>
#include <random>
#include <string>
#include <vector>

#include "core/classify.h"
#include "core/software.h"
#include "driven_socket.h"
#include "teach.h"

namespace Catch {
template <>
struct StringMaker<finrace::Cause> {
    static std::string convert(finrace::Cause cause) { return std::string(finrace::to_string(cause)); }
};
template <>
struct StringMaker<finrace::Variant> {
    static std::string convert(finrace::Variant variant)
    {
        return '"' + std::string(finrace::to_string(variant)) + '"';
    }
};
template <>
struct StringMaker<finrace::Certainty> {
    static std::string convert(finrace::Certainty certainty) { return std::string(finrace::to_string(certainty)); }
};
template <>
struct StringMaker<finrace::Ending> {
    static std::string convert(finrace::Ending ending)
    {
        static const char* const names[] = {
            "none", "verdict", "idle_close_by_peer", "idle_close_by_local", "complete_close", "unclassified"};
        return names[static_cast<int>(ending)];
    }
};
} // namespace Catch

using namespace finrace;
using finrace::test::Backend;
using finrace::test::DrivenSocket;
using finrace::test::ResetOptions;
using finrace::test::teach;

namespace {

constexpr std::uint32_t one_flight = 14'600;

Upstream upstream_with_timer(std::uint32_t ms, std::uint32_t spread_ms = 0)
{
    Upstream upstream;
    for (int i = 0; i < 4; ++i)
        teach(upstream.idle_timeout, ms);
    if (spread_ms != 0) {
        teach(upstream.idle_timeout, ms);
        teach(upstream.idle_timeout, ms + spread_ms);
    }
    return upstream;
}

const Upstream unlearned;

/// Lets the life end, if it has not.
void end(DrivenSocket& s)
{
    if (s.open_still())
        s.close();
    if (s.open_still())
        s.local_fin_acknowledged();
    if (s.open_still())
        s.fin();
}

/// The one ending of a connection's life, out of all of its events. Lets the life end if it has not.
Classification ending_of(DrivenSocket s, const Upstream& upstream)
{
    end(s);
    REQUIRE(!s.open_still());
    Classification ending;
    for (const event& e : s.events) {
        Classification c = classify(e, upstream);
        if (c.ending == Ending::none)
            continue;
        CHECK(ending.ending == Ending::none);
        CHECK(c.verdict.has_value() == (c.ending == Ending::verdict));
        ending = std::move(c);
    }
    return ending;
}

std::vector<std::uint32_t> learned_from(const DrivenSocket& s, const Upstream& upstream)
{
    std::vector<std::uint32_t> learned;
    for (const event& e : s.events)
        if (const auto ms = classify(e, upstream).learned_idle_ms)
            learned.push_back(*ms);
    return learned;
}

struct Expected {
    Cause cause;
    Variant variant;
    Certainty certainty;
    bool incomplete = false;
};

void check(const Classification& c, const Expected& expected)
{
    REQUIRE(c.ending == Ending::verdict);
    CHECK(c.verdict->cause == expected.cause);
    CHECK(c.verdict->variant == expected.variant);
    CHECK(c.verdict->certainty == expected.certainty);
    CHECK(c.verdict->incomplete == expected.incomplete);
    CHECK(c.verdict->message.size() > 20);
    // Of verdicts a proven crossing alone tells how long the upstream lets connections rest.
    if (c.learned_idle_ms) {
        CHECK(expected.certainty == Certainty::proven);
        CHECK((expected.variant == Variant::fin_crossed || expected.variant == Variant::reset_crossed));
    }
}

void check(const DrivenSocket& s, const Expected& expected, const Upstream& upstream = unlearned)
{
    check(ending_of(s, upstream), expected);
}

void check(const DrivenSocket& s, Ending expected, const Upstream& upstream = unlearned)
{
    CHECK(ending_of(s, upstream).ending == expected);
}

/// A connection after `exchanges` answered ones.
DrivenSocket used(int exchanges = 1, Backend backend = Backend::trace, std::uint64_t opened_after_ms = 0)
{
    DrivenSocket s(backend);
    s.wait_ms(opened_after_ms);
    s.open();
    for (int i = 0; i < exchanges; ++i) {
        s.wait_ms(1);
        s.request(100);
        s.wait_ms(1);
        s.receive(1000);
    }
    return s;
}

/// The same, left idle, and a request under way.
DrivenSocket requested(std::uint64_t idle_ms, std::uint32_t bytes = 100, Backend backend = Backend::trace)
{
    DrivenSocket s = used(1, backend);
    s.wait_ms(idle_ms);
    s.request(bytes);
    return s;
}

DrivenSocket preconnected(std::uint64_t ahead_ms, std::uint32_t bytes = 100)
{
    DrivenSocket s;
    s.open();
    s.wait_ms(ahead_ms);
    s.request(bytes);
    return s;
}

// First bytes of what a client sends, as connection_notable_send() takes them.
constexpr std::uint32_t get = 0x47455420;
constexpr std::uint32_t client_hello = 0x16030102;
constexpr std::uint32_t tls_finished = 0x14030300; // change_cipher_spec, and the rest of the flight behind it
constexpr std::uint32_t tls_data = 0x17030300;
constexpr std::uint32_t http2_preface = 0x50524920;

constexpr Expected fin_crossed{Cause::keepalive_race, Variant::fin_crossed, Certainty::proven};
/// By an upstream whose timer is not known.
constexpr Expected fin_crossed_in_part{Cause::keepalive_race, Variant::fin_crossed, Certainty::possible};
constexpr Expected reset_crossed{Cause::keepalive_race, Variant::reset_crossed, Certainty::proven};
constexpr Expected reset_crossed_in_part{Cause::keepalive_race, Variant::reset_crossed, Certainty::possible};
constexpr Expected reset_closed{Cause::keepalive_race, Variant::reset_closed, Certainty::likely};
constexpr Expected stale_reuse{Cause::stale_reuse, Variant::none, Certainty::proven};
constexpr Expected stale_response{Cause::stale_response, Variant::none, Certainty::proven};
constexpr Expected rejected{Cause::request_rejected, Variant::none, Certainty::likely};
constexpr Expected closed_first{Cause::upstream_closed, Variant::none, Certainty::proven};
constexpr Expected closed_reused{Cause::upstream_closed, Variant::none, Certainty::likely};
constexpr Expected reset_first{Cause::upstream_reset, Variant::none, Certainty::proven};
constexpr Expected reset_reused{Cause::upstream_reset, Variant::none, Certainty::likely};
constexpr Expected response_cut{Cause::response_cut, Variant::none, Certainty::likely};

constexpr Expected incomplete(Expected expected)
{
    expected.incomplete = true;
    return expected;
}

constexpr Expected with(Expected expected, Certainty certainty)
{
    expected.certainty = certainty;
    return expected;
}

} // namespace

// ---------------------------------------------------------------------------------------------- FIN and request
// crossed

TEST_CASE("a FIN that acknowledges none of the request is a race, proven", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    const auto bytes = GENERATE(1U, 176U, 3600U, 10'000'000U);
    const auto after_ms = GENERATE(0U, 20U, 5000U); // no knowledge of timers or windows is needed
    DrivenSocket s = requested(2, bytes, backend);
    s.wait_ms(after_ms);
    s.fin(0U);
    check(s, fin_crossed);
    check(s, fin_crossed, upstream_with_timer(65'000));
}

TEST_CASE("all of the request acknowledged but its last byte, or that as well", "[classify]")
{
    DrivenSocket s = requested(2000, 176);
    s.wait_ms(20);
    SECTION("all but one: the rest crossed")
    {
        DrivenSocket rested = s;
        s.fin(175U);
        check(s, fin_crossed_in_part);
        check(s, with(fin_crossed_in_part, Certainty::likely), upstream_with_timer(2000));
        // Its application had read the head, and closed.
        check(s, with(rejected, Certainty::possible), upstream_with_timer(5000));
    }
    SECTION("all but one, without a rest: no idle timer")
    {
        DrivenSocket busy = requested(899, 176);
        busy.fin(175U);
        check(busy, with(rejected, Certainty::possible));
        DrivenSocket idle = requested(900, 176);
        idle.fin(175U);
        check(idle, fin_crossed_in_part);
    }
    SECTION("all")
    {
        s.fin(176U);
        check(s, closed_reused, upstream_with_timer(5000));
    }
    SECTION("all but one is no race if it comes later than a race can")
    {
        s.wait_ms(80);
        DrivenSocket later = s;
        s.fin(175U);
        check(s, fin_crossed_in_part);
        later.wait_ms(1);
        later.fin(175U);
        check(later, Ending::unclassified);
    }
    SECTION("none or one")
    {
        DrivenSocket one = s;
        s.wait_ms(5000);
        s.fin(0U);
        check(s, fin_crossed);
        one.wait_ms(5000);
        one.fin(1U);
        check(one, Ending::unclassified);
    }
}

TEST_CASE("a proven crossing teaches how long the upstream lets connections rest", "[classify]")
{
    const bool by_fin = GENERATE(true, false);
    const auto crossed = [by_fin](DrivenSocket s, std::uint64_t after_ms, std::uint32_t acknowledged = 0) {
        s.wait_ms(after_ms);
        if (by_fin)
            s.fin(acknowledged);
        else
            s.reset({.acknowledges = acknowledged});
        return s;
    };
    CHECK(learned_from(crossed(requested(1990), 10), unlearned) == std::vector{2000U});
    CHECK(learned_from(crossed(requested(890), 10), unlearned) == std::vector{900U});
    CHECK(learned_from(crossed(requested(889), 10), unlearned).empty()); // no server's timer is as short
    CHECK(learned_from(crossed(requested(1990), 10, 1), unlearned).empty());
    CHECK(learned_from(crossed(requested(1990), 10, 100), unlearned).empty());
    CHECK(learned_from(crossed(requested(1900), 100), unlearned) == std::vector{2000U});
    CHECK(learned_from(crossed(requested(1900), 101), unlearned).empty());   // the close may have come late
    CHECK(learned_from(crossed(preconnected(1990), 10), unlearned).empty()); // that may be another timer
    DrivenSocket adopted = requested(1990);
    adopted.c.flags |= CONNECTION_ADOPTED | CONNECTION_ADOPTED_IN_EXCHANGE;
    CHECK(learned_from(crossed(adopted, 10), unlearned).empty());

    Upstreams upstreams;
    UpstreamKey key{};
    for (std::uint64_t i = 0; i < 3; ++i) {
        DrivenSocket s = used(1, Backend::trace, i * 1000);
        s.wait_ms(1990);
        s.request(100);
        for (const event& e : crossed(s, 10).events) {
            account(e, upstreams);
            key = UpstreamKey::of(e);
        }
    }
    const auto timeout = upstreams.at(key).idle_timeout.timeout();
    REQUIRE(timeout);
    CHECK(timeout->ms == 2000);
}

TEST_CASE("the race window grows with the round trip", "[classify]")
{
    DrivenSocket s = requested(2000);
    s.srtt_us = 40'000;
    s.wait_ms(180);
    DrivenSocket later = s;
    s.fin(99U);
    check(s, fin_crossed_in_part);
    later.wait_ms(1);
    later.fin(99U);
    check(later, Ending::unclassified);
}

TEST_CASE("a part of more than one flight was still to come", "[classify]")
{
    DrivenSocket s = requested(2000, one_flight);
    s.fin(1000U);
    check(s, fin_crossed_in_part);
    DrivenSocket larger = requested(2000, one_flight + 1);
    larger.fin(1000U);
    check(larger, with(rejected, Certainty::possible)); // an idle close, should the timer be as short
    DrivenSocket all_but_one = requested(2000, one_flight + 1);
    all_but_one.fin(one_flight);
    check(all_but_one, rejected, upstream_with_timer(5000));
    DrivenSocket all = requested(2000, one_flight + 1);
    all.fin(one_flight + 1);
    check(all, {Cause::upstream_closed, Variant::none, Certainty::likely}, upstream_with_timer(5000));
    DrivenSocket upload = requested(2000, 10'000'000);
    upload.wait_ms(5000);
    upload.fin(1'000'000U);
    check(upload, rejected);
    DrivenSocket answered = requested(2000, 10'000'000);
    answered.receive(300, 1'000'000U);
    DrivenSocket whole = answered;
    answered.fin(1'000'000U);
    check(answered, {Cause::request_rejected, Variant::early_answer, Certainty::possible});
    whole.fin();
    check(whole, Ending::complete_close);
    // At the upstream's timer an idle close met the request's beginning.
    constexpr Expected lingering{Cause::keepalive_race, Variant::fin_lingering, Certainty::possible};
    constexpr Expected unread{Cause::keepalive_race, Variant::reset_unread, Certainty::possible};
    for (const std::uint64_t idle : {4950U, 4849U}) {
        DrivenSocket by_fin = requested(idle, 100'000);
        DrivenSocket by_reset = by_fin;
        by_fin.fin(one_flight);
        by_reset.reset({.acknowledges = one_flight});
        check(by_fin, idle == 4950 ? lingering : rejected, upstream_with_timer(5000));
        check(by_reset, idle == 4950 ? unread : rejected, upstream_with_timer(5000));
    }
    DrivenSocket untouched = requested(2000, 10'000'000);
    untouched.fin(0U);
    check(untouched, fin_crossed);
}

TEST_CASE("a server that is short of workers closes at its timer what it has not read", "[classify]")
{
    // Before the timer is known: it has closed another connection after as long a rest.
    constexpr Expected lingering{Cause::keepalive_race, Variant::fin_lingering, Certainty::possible};
    const auto upstream_after = [](std::uint64_t later_ms, std::optional<std::uint32_t> acknowledged) {
        DrivenSocket s = used();
        s.wait_ms(later_ms + 2000 - (acknowledged ? 1 : 0));
        if (acknowledged) {
            s.request(100);
            s.wait_ms(1);
        }
        s.fin(acknowledged);
        event e = s.last();
        e.connection.id = 11;
        e.connection.fin_idle_ms -= static_cast<std::uint32_t>(acknowledged ? 0 : later_ms);
        e.connection.idle_ms -= static_cast<std::uint32_t>(acknowledged ? later_ms : 0);
        Upstream upstream;
        upstream.closes.note(e);
        return upstream;
    };
    const auto closed_after = [](std::uint64_t idle_ms, std::uint64_t after_ms) {
        DrivenSocket s = requested(idle_ms);
        s.wait_ms(after_ms);
        s.fin(100);
        return s;
    };
    for (const auto acknowledged : {std::optional<std::uint32_t>(), std::optional<std::uint32_t>(0)}) {
        const Upstream upstream = upstream_after(1000, acknowledged);
        check(closed_after(1700, 300), lingering, upstream);
        check(closed_after(1700, 262), lingering, upstream); // within 1 % and 20 ms
        check(closed_after(1700, 258), closed_reused, upstream);
        check(closed_after(1700, 341), closed_reused, upstream);
        check(closed_after(1000, 1000), lingering, upstream);
        check(closed_after(999, 1001), closed_reused, upstream);
        check(closed_after(1700, 300), closed_reused, upstream_with_timer(5000));
        // Near another timer that has been learned, in the race window alone.
        Upstream learned = upstream;
        for (int i = 0; i < 3; ++i)
            teach(learned.idle_timeout, 2700);
        check(closed_after(1900, 100), lingering, learned);
        check(closed_after(1899, 101), closed_reused, learned);
        check(closed_after(2100, 20), closed_reused, learned);
    }
    Upstream busy = upstream_after(1000, std::nullopt);
    for (std::uint64_t i = 0; i < 100; ++i) { // none of them says anything of a timer
        DrivenSocket s = used(1, Backend::trace, 5000 + 500 * i);
        s.wait_ms(300);
        s.fin();
        event e = s.last();
        e.connection.id = 100 + i;
        busy.closes.note(e);
    }
    check(closed_after(1700, 300), lingering, busy);
    Upstream patient = upstream_after(1000, std::nullopt);
    patient.longest_answered_idle_ms = 2 * 2000;
    check(closed_after(1700, 300), lingering, patient);
    patient.longest_answered_idle_ms = 2 * 2000 + 1;
    check(closed_after(1700, 300), closed_reused, patient);
    Upstream restarted = upstream_after(1000, std::nullopt);
    for (const std::uint32_t rested_ms : {4000U, 4001U}) { // at the same instant: a timer's, perhaps, and an end's
        check(closed_after(1700, 300), lingering, restarted);
        DrivenSocket s = used();
        s.wait_ms(3000);
        s.fin();
        event e = s.last();
        e.connection.id = rested_ms;
        e.connection.fin_idle_ms = rested_ms;
        restarted.closes.note(e);
    }
    check(closed_after(1700, 300), closed_reused, restarted);
    check(closed_after(1700, 300), closed_reused, upstream_after(1000, 100));        // that one may have died as well
    check(closed_after(1700, 300), closed_reused, upstream_after(50, std::nullopt)); // at the same instant
}

TEST_CASE("an upstream that closes right behind its answers left the next request unread", "[classify]")
{
    constexpr Expected unread{Cause::keepalive_race, Variant::reset_unread, Certainty::likely};
    const auto reset_after = [](std::uint64_t ms) {
        DrivenSocket s = requested(0, 100);
        s.wait_ms(ms);
        s.reset({.acknowledges = 100});
        return s;
    };
    Upstream upstream;
    const auto note = [&upstream](std::uint64_t id, DrivenSocket s, std::optional<std::uint32_t> acknowledged) {
        s.wait_ms(1000 * id);
        s.request(100);
        s.receive(1000);
        s.wait_ms(2);
        if (acknowledged)
            s.request(100);
        s.fin(acknowledged);
        event e = s.last();
        e.connection.id = id;
        upstream.closes.note(e);
    };
    check(reset_after(3), reset_reused, upstream);
    // What took a request is no witness of when it closes by itself.
    note(11, requested(0, 100), 100);
    note(12, requested(0, 100), 100);
    check(reset_after(3), reset_reused, upstream);
    note(13, requested(0, 100), 0);
    note(14, requested(0, 100), std::nullopt);
    check(reset_after(3), unread, upstream);
    check(reset_after(11), reset_reused, upstream);
    DrivenSocket by_fin = requested(0, 100);
    by_fin.wait_ms(3);
    by_fin.fin(100);
    check(by_fin, Expected{Cause::upstream_closed, Variant::none, Certainty::likely}, upstream);
}

TEST_CASE("pipelined requests cross as one", "[classify]")
{
    DrivenSocket s = requested(2000, 100);
    s.send(100);
    s.wait_ms(20);
    SECTION("none acknowledged")
    {
        s.fin(0U);
        check(s, fin_crossed);
    }
    SECTION("the first acknowledged")
    {
        s.fin(100U);
        check(s, fin_crossed_in_part);
    }
    SECTION("the first answered: what is known of the second is not enough for a name")
    {
        s.receive(10, 100U);
        s.fin(100U);
        check(s, Ending::unclassified);
    }
}

TEST_CASE("more of the request written after the FIN changes nothing", "[classify]")
{
    DrivenSocket s = requested(2000);
    s.fin(0U);
    s.wait_ms(1);
    s.send(5000);
    s.reset({.answers = ResetOptions::Answers::after_fin});
    check(s, fin_crossed);
}

TEST_CASE("the first request on a connection: opened ahead, or closed on accept", "[classify]")
{
    constexpr Expected on_accept{Cause::upstream_closed, Variant::on_accept, Certainty::proven};
    constexpr Expected reset_on_accept{Cause::upstream_reset, Variant::on_accept, Certainty::proven};
    const auto rtt_ms = GENERATE(0U, 40U);

    DrivenSocket young;
    young.srtt_us = rtt_ms * 1000;
    young.open();
    young.wait_ms(80);
    young.request(100);
    young.wait_ms(20 + 2 * rtt_ms);
    DrivenSocket older = young;
    older.wait_ms(1);

    SECTION("FIN")
    {
        young.fin(0U);
        check(young, on_accept);
        older.fin(0U);
        check(older, fin_crossed);
    }
    SECTION("RST")
    {
        young.reset({.acknowledges = 0U});
        check(young, reset_on_accept);
        older.reset({.acknowledges = 0U});
        check(older, reset_crossed);
    }
    SECTION("in part")
    {
        young.fin(40U);
        check(young, with(on_accept, Certainty::likely));
    }
    SECTION("bare RST")
    {
        young.reset();
        check(young, reset_reused); // upstream_reset, likely
    }
}

TEST_CASE("a second request is never one on accept, however young the connection", "[classify]")
{
    DrivenSocket s = requested(0);
    s.fin(0U);
    check(s, fin_crossed);
}

TEST_CASE("an answer before the request's end makes no race of its rest", "[classify]")
{
    DrivenSocket s = used();
    s.wait_ms(2000);
    s.request(50'000);
    s.wait_ms(5);
    s.receive(200, 20'000U); // 413
    s.send(8'000);           // the upload goes on: it looks like a new request
    s.wait_ms(1);
    SECTION("FIN")
    {
        s.fin(20'000U);
        check(s, Ending::unclassified, upstream_with_timer(5000));
    }
    SECTION("RST with ACK")
    {
        s.reset({.acknowledges = 20'000U});
        check(s, Ending::unclassified);
    }
    SECTION("bare RST")
    {
        s.reset();
        check(s, Ending::unclassified);
    }
    SECTION("and where acknowledgements show a new request, it is one")
    {
        s.fin(50'000U);
        check(s, fin_crossed);
    }
}

// ------------------------------------------------------------------------------------- acknowledged, not answered

TEST_CASE("a FIN that acknowledges all, at the upstream's timer or elsewhere", "[classify]")
{
    constexpr Expected lingering{Cause::keepalive_race, Variant::fin_lingering, Certainty::likely};
    constexpr Expected near = with(lingering, Certainty::possible);
    // Of the last byte to the FIN: 1 % and 20 ms are the timer's, 2 % and 50 ms perhaps: 4930 to 5070, 4850 to 5150 ms.
    const Upstream upstream = upstream_with_timer(5000);
    const auto closed_after = [](std::uint64_t idle, std::uint64_t after) {
        DrivenSocket s = requested(idle);
        s.wait_ms(after);
        s.fin();
        return s;
    };
    check(closed_after(4850, 0), near, upstream);
    check(closed_after(4849, 0), closed_reused, upstream);
    check(closed_after(5150, 0), near, upstream);
    check(closed_after(5151, 0), closed_reused, upstream);
    check(closed_after(4930, 0), lingering, upstream);
    check(closed_after(4929, 0), near, upstream);
    check(closed_after(5070, 0), lingering, upstream);
    check(closed_after(5071, 0), near, upstream);
    // What counts is the rest up to the close.
    check(closed_after(4750, 100), near, upstream);
    check(closed_after(4749, 100), closed_reused, upstream);
    check(closed_after(5050, 100), near, upstream);
    check(closed_after(5051, 100), closed_reused, upstream);
    // Within the race window.
    check(closed_after(4900, 100), lingering, upstream);
    check(closed_after(4900, 101), near, upstream);
    // Beyond it, a request that lay unread up to the timer itself, if it waited for less than half of that.
    check(closed_after(4829, 101), near, upstream);
    check(closed_after(4828, 101), closed_reused, upstream);
    check(closed_after(2500, 2500), near, upstream);
    check(closed_after(2499, 2501), closed_reused, upstream);

    SECTION("a timer with a spread")
    {
        const Upstream wide = upstream_with_timer(5000, 60); // 5000 to 5060: 4930 to 5130, 4850 to 5210
        check(closed_after(4850, 0), near, wide);
        check(closed_after(4849, 0), closed_reused, wide);
        check(closed_after(4930, 0), lingering, wide);
        check(closed_after(4929, 0), near, wide);
        check(closed_after(5130, 0), lingering, wide);
        check(closed_after(5131, 0), near, wide);
        check(closed_after(5210, 0), near, wide);
        check(closed_after(5211, 0), closed_reused, wide);
    }
    SECTION("a round trip of 40 ms: 80 ms more of either")
    {
        const auto far = [](std::uint64_t idle, std::uint64_t after) {
            DrivenSocket s = requested(idle);
            s.srtt_us = 40'000;
            s.wait_ms(after);
            s.fin();
            return s;
        };
        check(far(4770, 0), near, upstream);
        check(far(4850, 0), lingering, upstream);
        check(far(4849, 0), near, upstream);
        check(far(4769, 0), closed_reused, upstream);
        check(far(4850, 180), lingering, upstream);
        check(far(4850, 181), near, upstream);
        check(far(4669, 181), near, upstream);
        check(far(4668, 181), closed_reused, upstream);
    }
    SECTION("the timer not learned: possible after a rest that a timer may have, else not")
    {
        check(closed_after(900, 0), with(lingering, Certainty::possible));
        check(closed_after(899, 0), closed_reused);
        check(closed_after(900, 100), with(lingering, Certainty::possible));
        check(closed_after(900, 101), closed_reused);
    }
    SECTION("the timer not learned, and a rest of more than twice that was answered")
    {
        const auto used_after = [](std::uint64_t idle_ms, bool answered) {
            Upstreams upstreams;
            DrivenSocket s = requested(idle_ms);
            if (answered)
                s.receive(200);
            s.fin();
            end(s);
            for (const event& e : s.events)
                account(e, upstreams);
            return upstreams.at(UpstreamKey::of(s.events.back()));
        };
        check(closed_after(1000, 0), with(lingering, Certainty::possible), used_after(2000, true));
        check(closed_after(1000, 0), closed_reused, used_after(2001, true));
        check(closed_after(1000, 0), with(lingering, Certainty::possible), used_after(2001, false));
    }
    SECTION("too few samples are no timer")
    {
        Upstream barely;
        teach(barely.idle_timeout, 5000);
        teach(barely.idle_timeout, 5000);
        check(closed_after(3000, 0), with(lingering, Certainty::possible), barely);
        teach(barely.idle_timeout, 5000);
        check(closed_after(3000, 0), closed_reused, barely);
    }
}

TEST_CASE("the first request, taken and not answered", "[classify]")
{
    constexpr Expected lingering{Cause::keepalive_race, Variant::fin_lingering, Certainty::possible};
    SECTION("at once after opening")
    {
        DrivenSocket s = preconnected(1);
        s.wait_ms(20);
        s.fin();
        check(s, closed_first);
        check(s, closed_first, upstream_with_timer(5000));
    }
    SECTION("after 300 ms of thought")
    {
        DrivenSocket s = preconnected(1);
        s.wait_ms(300);
        s.fin();
        check(s, closed_first);
    }
    SECTION("opened long ahead")
    {
        DrivenSocket s = preconnected(899);
        s.fin();
        check(s, closed_first);
        DrivenSocket longer = preconnected(900);
        longer.fin();
        check(longer, lingering);
        DrivenSocket at_timer = preconnected(5000);
        at_timer.fin();
        check(at_timer, with(lingering, Certainty::likely), upstream_with_timer(5000));
    }
}

TEST_CASE("an RST that acknowledges all: unread at the timer, or aborted", "[classify]")
{
    constexpr Expected unread{Cause::keepalive_race, Variant::reset_unread, Certainty::likely};
    const Upstream upstream = upstream_with_timer(5000);
    const auto reset_after = [](std::uint64_t idle, std::uint64_t after, std::uint32_t bytes = 100) {
        DrivenSocket s = requested(idle, bytes);
        s.wait_ms(after);
        s.reset({.acknowledges = bytes});
        return s;
    };
    check(reset_after(4930, 0), unread, upstream);
    check(reset_after(4929, 0), with(unread, Certainty::possible), upstream);
    check(reset_after(4850, 0), with(unread, Certainty::possible), upstream);
    check(reset_after(4849, 0), reset_reused, upstream);
    check(reset_after(5150, 0), with(unread, Certainty::possible), upstream);
    check(reset_after(5151, 0), reset_reused, upstream);
    check(reset_after(4900, 100), unread, upstream);
    check(reset_after(4900, 101), with(unread, Certainty::possible), upstream);
    check(reset_after(2499, 2501), reset_reused, upstream);
    check(reset_after(900, 0), with(unread, Certainty::possible));
    check(reset_after(899, 0), reset_reused);
    check(reset_after(4950, 0, one_flight + 1), unread, upstream);
    check(reset_after(200, 0, one_flight + 1), reset_reused, upstream);
    Upstream sometimes_early = upstream_with_timer(5000);
    teach(sometimes_early.idle_timeout, 4500);
    check(reset_after(4350, 0), with(unread, Certainty::possible), sometimes_early);
    check(reset_after(4349, 0), reset_reused, sometimes_early);
    check(reset_after(4500, 101), reset_reused, sometimes_early);

    DrivenSocket first = preconnected(1);
    first.wait_ms(20);
    first.reset({.acknowledges = 100U});
    check(first, reset_first);
}

TEST_CASE("an RST that waits while a process writes a request", "[classify]")
{
    DrivenSocket s = used(1, Backend::cgroup);
    s.wait_ms(2000);
    SECTION("with ACK: the whole request crossed it")
    {
        s.reset({.acknowledges = 0U, .meets_request = 100});
        check(s, reset_crossed);
    }
    SECTION("bare")
    {
        s.reset({.meets_request = 100});
        check(s, reset_closed);
    }
}

TEST_CASE("an RST behind data that waits on the socket's backlog", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s = requested(2000, 100, backend);
    s.reset({.acknowledges = 100U, .behind_received = 1000});
    check(s, response_cut);
    CHECK(s.last_of(EVENT_PEER_RESET)->response_bytes == 1000);
}

TEST_CASE("an RST with ACK that crossed the request", "[classify]")
{
    DrivenSocket s = requested(2000);
    s.wait_ms(20);
    SECTION("none acknowledged")
    {
        s.wait_ms(5000);
        s.reset({.acknowledges = 0U});
        check(s, reset_crossed);
    }
    SECTION("all but one byte")
    {
        s.reset({.acknowledges = 99U});
        check(s, reset_crossed_in_part);
    }
    SECTION("all")
    {
        s.reset({.acknowledges = 100U});
        check(s, reset_reused, upstream_with_timer(5000));
    }
    SECTION("a part of an upload")
    {
        DrivenSocket upload = requested(2000, 10'000'000);
        upload.acknowledge(900'000U);
        upload.reset({.acknowledges = 1'000'000U});
        check(upload, rejected, upstream_with_timer(5000));
    }
}

TEST_CASE("a bare RST", "[classify]")
{
    DrivenSocket s = requested(2000);
    SECTION("as soon as an answer can be, and later")
    {
        s.srtt_us = 10'000;
        s.wait_ms(120);
        DrivenSocket later = s;
        s.reset();
        check(s, reset_closed);
        later.wait_ms(1);
        later.reset();
        check(later, Ending::unclassified);
    }
    SECTION("with any of the request acknowledged, a socket was there")
    {
        s.acknowledge(1U);
        s.reset();
        check(s, Ending::unclassified);
        DrivenSocket upload = requested(2000, one_flight + 1);
        upload.acknowledge(1U);
        DrivenSocket in_vain = upload;
        upload.reset();
        check(upload, rejected, upstream_with_timer(5000));
        check(upload, with(rejected, Certainty::possible), upstream_with_timer(2000));
        in_vain.retransmits = 1;
        in_vain.reset();
        check(in_vain, Ending::unclassified);
        DrivenSocket taken = requested(2000, one_flight + 1);
        taken.acknowledge(one_flight + 1);
        taken.reset();
        check(taken, Ending::unclassified);
    }
    SECTION("after a silence")
    {
        s.retransmits = 1;
        s.wait_ms(999);
        DrivenSocket longer = s;
        s.reset();
        check(s, Ending::unclassified);
        longer.wait_ms(1);
        DrivenSocket window_of_zero = longer;
        longer.reset();
        check(longer, {Cause::path_dropped, Variant::none, Certainty::likely});
        window_of_zero.retransmits = 0;
        window_of_zero.reset();
        check(window_of_zero, Ending::unclassified);
    }
    SECTION("its header not seen: with or without ACK is not known")
    {
        s.reset({.header_seen = false});
        check(s, Ending::unclassified);
    }
    SECTION("on a first request, young or opened ahead")
    {
        DrivenSocket young = preconnected(100);
        DrivenSocket older = preconnected(101);
        young.reset();
        check(young, reset_reused);
        older.reset();
        check(older, reset_closed);
    }
}

// ------------------------------------------------------------------------------------------------------- stale reuse

TEST_CASE("sent after the FIN, or just before", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s = used(2, backend);
    s.wait_ms(5000);
    SECTION("a microsecond after")
    {
        s.fin();
        s.wait_ns(1000);
        s.request(100);
        s.wait_ms(20);
        s.reset({.answers = ResetOptions::Answers::after_fin});
        const auto c = ending_of(s, unlearned);
        check(c, stale_reuse);
        CHECK(c.verdict->message.find("0.001 ms") != std::string::npos);
        CHECK(learned_from(s, unlearned) == std::vector{5000U}); // its idle close teaches all the same
    }
    SECTION("a microsecond before")
    {
        s.request(100);
        s.wait_ns(1000);
        s.fin(0U);
        check(s, fin_crossed);
    }
    SECTION("minutes after")
    {
        s.fin();
        s.wait_ms(300'000);
        s.request(100);
        check(s, stale_reuse);
    }
    SECTION("no answer, no RST: the process closes")
    {
        s.fin();
        s.request(100);
        s.close();
        check(s, stale_reuse);
    }
}

TEST_CASE("sent after a FIN that came with a response: it may be the rest of a request", "[classify]")
{
    DrivenSocket s = used();
    s.wait_ms(99);
    DrivenSocket idle = s;
    s.fin();
    s.request(100);
    check(s, with(stale_reuse, Certainty::likely));
    idle.wait_ms(1);
    idle.fin();
    idle.request(100);
    check(idle, stale_reuse);
    DrivenSocket first;
    first.open();
    first.fin();
    first.request(100);
    // Nothing before it that it could be the rest of; and no keep-alive timer closes what has just been opened.
    check(first, {Cause::upstream_closed, Variant::on_accept, Certainty::proven});
    DrivenSocket ahead;
    ahead.open();
    ahead.wait_ms(101);
    ahead.fin();
    ahead.request(100);
    check(ahead, stale_reuse);
}

TEST_CASE("a TLS farewell after the FIN is no request", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s = used(2, backend);
    s.wait_ms(5000);
    SECTION("close_notify, and the process closes; the end teaches where the FIN's event was lost")
    {
        if (GENERATE(false, true))
            s.ring_full_for = {EVENT_PEER_FIN};
        s.fin();
        s.request(FINRACE_TLS_FAREWELL_BYTES);
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned) == std::vector{5000U});
    }
    SECTION("one byte more may be a request, twice as much is one")
    {
        s.fin();
        DrivenSocket longer = s;
        s.request(FINRACE_TLS_FAREWELL_BYTES + 1);
        check(s, with(stale_reuse, Certainty::possible));
        CHECK(s.last().request_bytes == FINRACE_TLS_FAREWELL_BYTES + 1);
        DrivenSocket longest = longer;
        longer.request(2 * FINRACE_TLS_FAREWELL_BYTES);
        check(longer, with(stale_reuse, Certainty::possible));
        longest.request(2 * FINRACE_TLS_FAREWELL_BYTES + 1);
        check(longest, stale_reuse);
    }
    SECTION("a request written in two pieces, the first of them tiny: known with the second")
    {
        s.fin();
        s.request(10);
        CHECK(s.last_of(EVENT_SENT_AFTER_FIN) == nullptr);
        s.send(100);
        CHECK(s.last().kind == EVENT_SENT_AFTER_FIN);
        CHECK(s.last().request_bytes == 110);
        s.send(100);
        s.close();
        s.local_fin_acknowledged();
        check(s, stale_reuse);
    }
    SECTION("after a response and its FIN")
    {
        s.request(100);
        s.receive(1000);
        s.fin();
        s.request(24);
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::complete_close);
    }
}

TEST_CASE("HTTP/1 knows no farewell: a short request is one", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s(backend);
    s.first_bytes = get;
    s.open();
    s.request(100);
    s.receive(1000);
    s.wait_ms(5000);
    DrivenSocket crossed = s;
    s.fin();
    SECTION("after the FIN")
    {
        s.request(FINRACE_TLS_FAREWELL_BYTES - 4);
        check(s, stale_reuse);
    }
    SECTION("more of an answered request's body, after the FIN")
    {
        s.first_bytes = 0x7b22226e;
        s.request(2000);
        CHECK(s.last_of(EVENT_SENT_AFTER_FIN) == nullptr);
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::idle_close_by_peer);
    }
    SECTION("what could not be read may be a request")
    {
        s.first_bytes = 0;
        s.request(2000);
        check(s, stale_reuse);
    }
    SECTION("across it, unless it is less than a request line")
    {
        DrivenSocket shorter = crossed;
        crossed.request(18);
        crossed.fin(0U);
        check(crossed, fin_crossed);
        shorter.request(17);
        shorter.wait_ms(5000);
        shorter.close();
        shorter.local_fin_acknowledged();
        check(shorter, Ending::idle_close_by_local);
    }
}

TEST_CASE("HTTP/2 within TLS: so few bytes may ask nothing", "[classify]")
{
    DrivenSocket s;
    s.first_bytes = client_hello;
    s.open();
    s.request(500);
    s.receive(3000);
    s.first_bytes = tls_data;
    s.request(200);
    s.receive(300);
    s.wait_ms(5000);
    DrivenSocket longer = s;
    s.request(2 * FINRACE_TLS_FAREWELL_BYTES); // PING, or two WINDOW_UPDATEs
    s.fin(0U);
    check(s, with(fin_crossed, Certainty::possible));
    longer.request(2 * FINRACE_TLS_FAREWELL_BYTES + 1);
    longer.fin(0U);
    check(longer, fin_crossed);
}

TEST_CASE("the peer's TLS farewell before its FIN is no answer", "[classify]")
{
    DrivenSocket s = requested(2000);
    s.receive(FINRACE_TLS_FAREWELL_BYTES, 0U);
    DrivenSocket taken = s;
    s.fin(0U);
    check(s, fin_crossed);
    taken.fin(1U); // it had come to a part of the request: that may be an answer
    check(taken, Ending::unclassified);
    DrivenSocket longer = requested(2000);
    longer.receive(FINRACE_TLS_FAREWELL_BYTES + 1, 0U);
    longer.fin(0U);
    check(longer, with(stale_response, Certainty::likely));

    // All of the request acknowledged: an answer, unless the upstream's timer says otherwise.
    const auto closed = [](std::uint64_t idle, bool by_fin, std::uint32_t response, std::uint32_t acknowledged = 100) {
        DrivenSocket closing = requested(idle);
        closing.receive(response, acknowledged);
        if (by_fin)
            closing.fin(acknowledged);
        else
            closing.reset({.acknowledges = acknowledged});
        return closing;
    };
    const Upstream upstream = upstream_with_timer(5000);
    constexpr Expected lingering{Cause::keepalive_race, Variant::fin_lingering, Certainty::possible};
    constexpr Expected unread{Cause::keepalive_race, Variant::reset_unread, Certainty::possible};
    check(closed(5000, true, 24), lingering, upstream);
    check(closed(5000, false, 24), unread, upstream);
    check(closed(5000, false, 24, 0), reset_crossed, upstream);
    check(closed(5000, true, 32), Ending::complete_close, upstream);
    check(closed(5000, false, 32), response_cut, upstream);
    check(closed(4000, true, 24), Ending::complete_close, upstream);
    check(closed(4000, false, 24), response_cut, upstream);
    check(closed(5000, true, 24), Ending::complete_close);
}

TEST_CASE("this host's own TLS farewell before its close is no request", "[classify]")
{
    const auto close_after = [](std::uint32_t bytes) {
        DrivenSocket s = used();
        s.wait_ms(3000);
        s.request(bytes);
        s.close();
        s.local_fin_acknowledged();
        s.times_out();
        return s;
    };
    check(close_after(FINRACE_TLS_FAREWELL_BYTES), Ending::idle_close_by_local);
    check(close_after(FINRACE_TLS_FAREWELL_BYTES + 1), Ending::unclassified);
}

TEST_CASE("the next request after a FIN that left part of the last one unacknowledged", "[classify]")
{
    DrivenSocket s = used();
    s.wait_ms(1000);
    s.request(100);
    s.receive(50, 0U); // 408, written before the request arrived
    s.fin(0U);
    s.request(100);
    check(s, with(stale_response, Certainty::likely));
}

// ------------------------------------------------------------------------------------------------------- protocols

TEST_CASE("an answer that the close leaves no request for", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    const auto answered = [&](std::uint32_t first, std::uint32_t response, std::uint32_t acknowledged, bool by_fin) {
        DrivenSocket s(backend);
        s.first_bytes = first;
        s.open();
        s.request(100);
        s.receive(1000);
        s.wait_ms(5000);
        s.request(100);
        s.receive(response, acknowledged);
        if (by_fin)
            s.fin(acknowledged);
        else
            s.reset({.acknowledges = acknowledged});
        return s;
    };
    const bool by_fin = GENERATE(true, false);
    check(answered(get, 90, 0, by_fin), stale_response);
    check(answered(get, 19, 0, by_fin), stale_response); // HTTP/1 has no farewell
    check(answered(0, 90, 0, by_fin), with(stale_response, Certainty::likely));
    check(answered(http2_preface, 90, 0, by_fin), Ending::unclassified);
    check(answered(get, 90, 1, by_fin), Ending::unclassified); // some of it may have been read
    // All of it acknowledged: an answer.
    if (by_fin)
        check(answered(get, 90, 100, true), Ending::complete_close);
    else
        check(answered(get, 90, 100, false), response_cut);
}

TEST_CASE("this host closes on such an answer before it has the FIN behind it", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    const auto closed_on = [&](std::uint32_t first, std::uint32_t response, std::uint32_t acknowledged) {
        DrivenSocket s(backend);
        s.first_bytes = first;
        s.open();
        s.request(100);
        s.receive(1000);
        s.wait_ms(5000);
        s.request(100);
        s.receive(response, acknowledged);
        s.close();
        s.fin(acknowledged);
        s.local_fin_acknowledged();
        return s;
    };
    check(closed_on(get, 90, 0), stale_response);
    check(closed_on(get, 90, 1), Ending::idle_close_by_local);
    check(closed_on(get, 90, 100), Ending::idle_close_by_local);
    check(closed_on(0, FINRACE_TLS_FAREWELL_BYTES, 0), fin_crossed);
    check(closed_on(0, FINRACE_TLS_FAREWELL_BYTES + 1, 0), with(stale_response, Certainty::likely));
}

TEST_CASE("what an upstream says as it turns a new connection away is no stale answer", "[classify]")
{
    DrivenSocket s;
    s.first_bytes = get;
    s.open();
    s.request(100);
    s.wait_ms(1);
    s.receive(90, 0U);
    s.fin(0U);
    check(s, {Cause::upstream_closed, Variant::on_accept, Certainty::likely});
}

TEST_CASE("a request written behind an answer that lies unread", "[classify]")
{
    DrivenSocket s = used();
    s.wait_ms(5000);
    s.receive(90);
    s.fin();
    s.request(100);
    for (event& e : s.events)
        if (e.kind == EVENT_SENT_AFTER_FIN)
            e.unread_bytes = 90;
    check(s, with(stale_response, Certainty::likely));
    for (event& e : s.events)
        e.unread_bytes = FINRACE_TLS_FAREWELL_BYTES;
    check(s, with(stale_reuse, Certainty::likely));
}

TEST_CASE("TLS: what comes before the first request is no exchange", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s(backend);
    s.open();
    s.wait_ms(20);
    s.first_bytes = client_hello;
    s.request(500);
    s.wait_ms(20);
    DrivenSocket unanswered = s;
    s.receive(3000);
    s.wait_ms(1);
    DrivenSocket refused = s;
    s.first_bytes = tls_finished;
    s.request(80);
    CHECK(s.c.exchange == 1);
    CHECK((s.c.flags & CONNECTION_HANDSHAKE) != 0);

    SECTION("the first request follows the handshake at once, or after rest")
    {
        if (GENERATE(false, true)) {
            s.wait_ms(1);
            s.receive(400); // session tickets
            s.wait_ms(3000);
        }
        s.first_bytes = tls_data;
        s.request(200);
        CHECK(s.c.exchange == 1);
        CHECK((s.c.flags & CONNECTION_HANDSHAKE) == 0);
        CHECK(connection_request_bytes(&s.c, s.write_seq()) == 200);
        DrivenSocket closed = s;
        closed.wait_ms(300);
        closed.fin();
        const bool rested = s.c.idle_ms >= 900; // which only a learned timeout could tell from a race
        check(closed, {Cause::upstream_closed, Variant::none, rested ? Certainty::likely : Certainty::proven});
        s.wait_ms(10);
        s.receive(700);
        s.wait_ms(1500);
        s.request(200);
        CHECK(s.c.exchange == 2);
        s.wait_ms(10);
        s.fin(0U);
        check(s, fin_crossed);
    }
    SECTION("the upstream hangs up on the first word, or after some of its own")
    {
        const bool by_fin = GENERATE(true, false);
        const auto end = [by_fin](DrivenSocket& ended) {
            if (by_fin)
                ended.fin();
            else
                ended.reset({.acknowledges = 500U});
        };
        end(unanswered);
        check(unanswered, {Cause::handshake_failed, Variant::none, Certainty::proven});
        refused.receive(7); // an alert
        end(refused);
        check(refused, {Cause::handshake_failed, Variant::none, Certainty::likely});
    }
    SECTION("after this host's last part: within 900 ms a refusal, later the end of a connection opened ahead")
    {
        s.wait_ms(899);
        DrivenSocket later = s;
        s.fin();
        check(s, {Cause::handshake_failed, Variant::none, Certainty::likely});
        later.wait_ms(1);
        later.fin();
        check(later, Ending::idle_close_by_peer);
    }
    SECTION("a connection opened ahead, and let go of")
    {
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::idle_close_by_local);
    }
    SECTION("an alert of this host's: the upstream's close follows from it")
    {
        if (GENERATE(false, true)) { // TLS 1.3 hides its type
            s.first_bytes = tls_data;
            s.send(FINRACE_TLS_FAREWELL_BYTES);
        } else {
            s.first_bytes = 0x15030300;
            s.send(7);
        }
        CHECK(s.c.exchange == 1);
        s.fin();
        CHECK(!classify(s.last(), unlearned).verdict);
        check(s, Ending::idle_close_by_local);
    }
    SECTION("this host hangs up on it, and its client gets an error")
    {
        Outcome outcome;
        outcome.client = Client{.answered = true, .status = 502, .certainty = Certainty::likely};
        if (GENERATE(false, true)) {
            s.first_bytes = tls_data;
            s.send(24);
            s.fin();
        }
        s.close();
        REQUIRE(s.last().kind == EVENT_LOCAL_FIN);
        CHECK(depends_on_outcome(s.last()));
        check(classify(s.last(), unlearned, outcome), {Cause::handshake_failed, Variant::none, Certainty::likely});
        outcome.client->status = 499;
        CHECK(!classify(s.last(), unlearned, outcome).verdict);
    }
}

TEST_CASE("HTTP/2: what crosses a close may be no request, and what came no answer", "[classify]")
{
    DrivenSocket s;
    s.first_bytes = http2_preface;
    s.open();
    s.request(200);
    s.receive(100);
    s.wait_ms(5000);
    DrivenSocket window = s;
    DrivenSocket read = s;
    s.request(2 * FINRACE_TLS_FAREWELL_BYTES + 1);
    s.receive(17, 0U); // GOAWAY
    s.fin(0U);
    check(s, with(fin_crossed, Certainty::likely));
    read.request(100);
    read.wait_ms(400);
    read.fin();
    check(read, {Cause::upstream_closed, Variant::none, Certainty::possible});
    DrivenSocket acknowledged = window;
    acknowledged.request(26); // two WINDOW_UPDATEs
    acknowledged.wait_ms(5000);
    acknowledged.fin();
    check(acknowledged, Ending::idle_close_by_peer);
    window.request(2 * FINRACE_TLS_FAREWELL_BYTES);
    window.close();
    window.local_fin_acknowledged();
    check(window, Ending::idle_close_by_local);
}

// ----------------------------------------------------------------------------------------------- the response had
// begun

TEST_CASE("an RST after the response's first byte, or before", "[classify]")
{
    DrivenSocket s = requested(200);
    s.wait_ms(20);
    SECTION("before")
    {
        s.reset({.acknowledges = 100U});
        check(s, reset_reused);
    }
    SECTION("after one byte")
    {
        s.receive(1);
        s.reset({.acknowledges = 100U});
        check(s, response_cut);
    }
    SECTION("few bytes in answer to a large request: a 413")
    {
        constexpr Expected early{Cause::request_rejected, Variant::early_answer, Certainty::possible};
        const auto answered = [](std::uint32_t request, std::uint32_t response) {
            DrivenSocket large = requested(200, request);
            large.wait_ms(20);
            large.receive(response);
            large.reset({.acknowledges = request});
            return large;
        };
        check(answered(one_flight + 1, 1459), early);
        check(answered(one_flight + 1, 1460), response_cut);
        check(answered(one_flight, 1459), response_cut);
    }
    SECTION("bare, or its header unseen: the same")
    {
        s.receive(1);
        s.reset({.header_seen = GENERATE(true, false)});
        check(s, response_cut);
    }
    SECTION("after a pause, or after a rest that a timer may have")
    {
        s.receive(1000);
        s.wait_ms(899);
        DrivenSocket rested = s;
        s.reset({.acknowledges = 100U});
        check(s, response_cut);
        check(s, response_cut, upstream_with_timer(5000));
        rested.wait_ms(1);
        rested.reset({.acknowledges = 100U});
        check(rested, Ending::idle_close_by_peer);
        CHECK(learned_from(rested, unlearned) == std::vector{900U});
        // With a timer known that it does not fit, it is neither; but it teaches, for the timer may have changed.
        check(rested, Ending::unclassified, upstream_with_timer(5000));
        CHECK(learned_from(rested, upstream_with_timer(5000)) == std::vector{900U});
    }
    SECTION("at a short timer that is known: an idle close")
    {
        s.receive(1000);
        s.wait_ms(500);
        s.reset({.acknowledges = 100U});
        check(s, Ending::idle_close_by_peer, upstream_with_timer(500));
        check(s, Ending::idle_close_by_peer, upstream_with_timer(561));
        check(s, Ending::unclassified, upstream_with_timer(562)); // 61 ms of tolerance are one short
        CHECK(learned_from(s, upstream_with_timer(562)).empty());
    }
    SECTION("after half the time of a timer that is known it may be either")
    {
        s.receive(1000);
        s.wait_ms(500);
        s.reset({.acknowledges = 100U});
        check(s, Ending::unclassified, upstream_with_timer(1000));
        check(s, response_cut, upstream_with_timer(1001));
    }
    SECTION("with bytes of the request unacknowledged: an early refusal, which has no name yet")
    {
        s.send(100);
        s.receive(200, 100U);
        DrivenSocket acknowledged = s;
        s.reset({.acknowledges = 100U});
        check(s, Ending::unclassified);
        acknowledged.reset({.acknowledges = 200U}); // the RST's own acknowledgement is the newest
        check(acknowledged, response_cut);
    }
}

TEST_CASE("a FIN after the response's first byte is harmless", "[classify]")
{
    DrivenSocket s = requested(200);
    s.wait_ms(20);
    SECTION("without it")
    {
        s.fin();
        check(s, closed_reused);
    }
    SECTION("with it")
    {
        s.receive(1);
        s.fin();
        check(s, Ending::complete_close);
        CHECK(learned_from(s, unlearned).empty());
    }
    SECTION("soon, or after a rest")
    {
        s.receive(1000);
        s.wait_ms(899);
        DrivenSocket rested = s;
        s.fin();
        check(s, Ending::complete_close);
        CHECK(learned_from(s, unlearned).empty());
        rested.wait_ms(1);
        rested.fin();
        check(rested, Ending::idle_close_by_peer);
        CHECK(learned_from(rested, unlearned) == std::vector{900U});
    }
    SECTION("an answer that the FIN left part of the request without")
    {
        s.receive(50, 99U);
        s.fin(99U);
        check(s, Ending::unclassified);
    }
}

// ---------------------------------------------------------------------------------------------------------- harmless

TEST_CASE("idle closes", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    const Upstream upstream = upstream_with_timer(5000);
    DrivenSocket s = used(3, backend);
    s.wait_ms(5000);
    SECTION("by the upstream's FIN: learned once, counted once")
    {
        s.fin();
        s.wait_ms(1);
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned) == std::vector{5000U});
        CHECK(classify(*s.last_of(EVENT_PEER_FIN), unlearned).ending == Ending::none); // nothing has ended yet
    }
    SECTION("by the upstream's FIN, its event lost: learned and counted at the end")
    {
        s.ring_full_for = {EVENT_PEER_FIN};
        s.fin();
        s.close();
        s.local_fin_acknowledged();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned) == std::vector{5000U});
    }
    SECTION("by the upstream's RST")
    {
        s.reset({.acknowledges = 100U});
        check(s, Ending::idle_close_by_peer);
        check(s, Ending::idle_close_by_peer, upstream);
        CHECK(learned_from(s, upstream) == std::vector{5000U});
    }
    SECTION("by this host, in order")
    {
        s.close();
        s.local_fin_acknowledged();
        s.wait_ms(20);
        s.fin();
        check(s, Ending::idle_close_by_local);
        CHECK(learned_from(s, unlearned).empty());
    }
    SECTION("by this host, abruptly")
    {
        s.abort();
        check(s, Ending::idle_close_by_local);
    }
    SECTION("by both at once")
    {
        s.close();
        s.fin();
        check(s, Ending::idle_close_by_local);
        CHECK(learned_from(s, unlearned).empty());
    }
    SECTION("by this host, answered by an RST")
    {
        s.close();
        s.reset();
        check(s, Ending::idle_close_by_local);
    }
    SECTION("after a write of no bytes")
    {
        s.send(0);
        s.wait_ms(100);
        s.fin();
        check(s, Ending::idle_close_by_peer, upstream);
        CHECK(learned_from(s, upstream).empty());
    }
}

TEST_CASE("a connection never used", "[classify]")
{
    DrivenSocket s;
    s.open();
    s.wait_ms(5000);
    SECTION("FIN")
    {
        s.fin();
    }
    SECTION("RST")
    {
        s.reset({.acknowledges = 0U});
    }
    check(s, Ending::idle_close_by_peer, upstream_with_timer(5000));
    CHECK(learned_from(s, unlearned).empty());
}

TEST_CASE("this host gives up a request under way", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    const auto acknowledged = GENERATE(0U, 1U, 99U, 100U);
    const auto retransmits = GENERATE(0U, 1U); // none: a window of zero
    CAPTURE(acknowledged, retransmits);
    DrivenSocket s = requested(2000, 100, backend);
    s.acknowledge(acknowledged);
    s.retransmits = retransmits;
    s.wait_ms(999);
    DrivenSocket later = s;
    later.wait_ms(1);
    const auto check_both = [&](auto end, std::optional<Expected> silent) {
        end(s);
        check(s, Ending::unclassified);
        end(later);
        if (acknowledged == 0 && retransmits > 0 && silent)
            check(later, *silent);
        else
            check(later, Ending::unclassified);
    };
    constexpr Expected gave_up{Cause::path_dropped, Variant::gave_up, Certainty::likely};
    SECTION("close")
    {
        check_both(
            [](DrivenSocket& one) {
                one.close();
                one.retransmits += 3; // more silence, or acknowledgements that come too late, change nothing
                one.wait_ms(5000);
                one.local_fin_acknowledged();
                one.fin();
            },
            gave_up);
    }
    SECTION("close, and its event is lost")
    {
        later.ring_full_for = {EVENT_LOCAL_FIN};
        check_both(
            [](DrivenSocket& one) {
                one.close();
                one.local_fin_acknowledged();
                one.fin();
            },
            Expected{Cause::path_dropped, Variant::gave_up, Certainty::likely, true});
    }
    SECTION("shutdown(), and no answer comes of what is acknowledged later")
    {
        check_both(
            [](DrivenSocket& one) {
                one.shutdown();
                one.wait_ms(5000);
                one.local_fin_acknowledged();
                one.fin();
            },
            Expected{Cause::path_dropped, Variant::gave_up, Certainty::possible});
    }
    SECTION("shutdown() alone: an answer is awaited still")
    {
        for (DrivenSocket* one : {&s, &later}) {
            one->shutdown();
            one->wait_ms(5000);
            one->local_fin_acknowledged();
            one->receive(100);
            one->fin();
            check(*one, Ending::idle_close_by_local);
        }
    }
    SECTION("shutdown(), and nothing is ever acknowledged")
    {
        check_both(
            [](DrivenSocket& one) {
                one.shutdown();
                one.wait_ms(5000);
                one.times_out();
            },
            gave_up);
    }
    SECTION("abort")
    {
        // Older than the tracer, cgroup sees that RST leave; else the state comes first.
        check_both([](DrivenSocket& one) { one.abort(); }, gave_up);
    }
    SECTION("an RST of its own")
    {
        if (backend == Backend::trace) // cgroup can't tell it from the kernel's giving up
            check_both([](DrivenSocket& one) { one.local_reset(); }, gave_up);
    }
}

TEST_CASE("this host's kernel gives up a request under way", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    constexpr Expected dropped{Cause::path_dropped, Variant::none, Certainty::likely};
    constexpr Expected probes{Cause::path_dropped, Variant::unanswered_probes, Certainty::likely};
    SECTION("nothing of it acknowledged")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.retransmits = 1;
        s.wait_ms(999);
        DrivenSocket later = s;
        s.times_out();
        check(s, Ending::unclassified);
        later.wait_ms(1);
        later.times_out();
        check(later, dropped);
    }
    SECTION("a part")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.acknowledge(GENERATE(1U, 99U));
        s.wait_ms(60'000);
        s.times_out();
        check(s, Ending::unclassified);
    }
    SECTION("all of it, and an answer's first byte")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.acknowledge();
        s.wait_ms(60'000);
        DrivenSocket answered = s;
        s.times_out();
        check(s, with(probes, backend == Backend::trace ? Certainty::likely : Certainty::possible));
        answered.receive(1);
        answered.wait_ms(60'000);
        answered.times_out();
        check(answered, Ending::idle_close_by_local);
    }
    SECTION("on the first request: right after the handshake, or opened ahead")
    {
        for (const std::uint64_t ahead : {0U, 899U, 900U}) {
            CAPTURE(ahead);
            DrivenSocket s(backend);
            s.open();
            s.wait_ms(ahead);
            s.retransmits = 6;
            DrivenSocket large = s;
            s.request(536);
            s.wait_ms(60'000);
            s.times_out();
            large.request(537);
            large.wait_ms(60'000);
            large.times_out();
            check(s, ahead < 900 ? Expected{Cause::accept_stalled, Variant::none, Certainty::likely} : dropped);
            check(large, ahead < 900 ? Expected{Cause::accept_stalled, Variant::none, Certainty::possible}
                                     : with(dropped, Certainty::possible));
        }
    }
    SECTION("on a connection in use, and into its upstream's own close")
    {
        const auto rest = GENERATE(0U, 899U, 900U);
        DrivenSocket s = requested(rest, 100, backend);
        s.retransmits = 3;
        s.wait_ms(60'000);
        const Expected expected = with(dropped, rest < 900 ? Certainty::possible : Certainty::likely);
        DrivenSocket closed = s;
        DrivenSocket reset = s;
        DrivenSocket lucky = s;
        s.times_out();
        check(s, expected);
        closed.fin(0U);
        check(closed, expected);
        reset.reset({.acknowledges = 0U});
        check(reset, expected);
        lucky.retransmits = 0;
        lucky.fin(0U);
        check(lucky, fin_crossed);
    }
    SECTION("a farewell of TLS asked nothing")
    {
        DrivenSocket s = requested(2000, FINRACE_TLS_FAREWELL_BYTES, backend);
        s.retransmits = 3;
        s.wait_ms(60'000);
        DrivenSocket closed = s;
        s.times_out();
        check(s, Ending::idle_close_by_local);
        closed.close();
        closed.local_fin_acknowledged();
        closed.fin();
        check(closed, Ending::idle_close_by_local);
    }
    SECTION("behind an earlier request that is not acknowledged either: a sender's queue, no silence")
    {
        DrivenSocket s = requested(2000, 100'000, backend);
        s.retransmits = 1;
        s.receive(10, 50'000U);
        s.send(100);
        s.wait_ms(5000);
        s.close();
        s.local_fin_acknowledged();
        s.fin();
        check(s, Ending::unclassified);
    }
    SECTION("an ICMP error was the last word")
    {
        DrivenSocket s = requested(2000);
        s.retransmits = 6;
        s.wait_ms(60'000);
        s.times_out(EHOSTUNREACH);
        check(s, dropped);
        DrivenSocket aborted = requested(2000);
        aborted.wait_ms(60'000);
        aborted.times_out(ECONNABORTED);
        check(aborted, Ending::unclassified);
    }
    SECTION("a request older than the tracer")
    {
        DrivenSocket s(backend);
        s.open_unfollowed();
        s.request(100);
        s.adopt();
        s.retransmits = 6;
        s.wait_ms(60'000);
        s.times_out();
        check(s, Ending::unclassified);
    }
}

TEST_CASE("half-closed by this host", "[classify]")
{
    DrivenSocket s = requested(200);
    s.shutdown();
    s.local_fin_acknowledged();
    s.wait_ms(20);
    SECTION("answered")
    {
        s.receive(1000);
        s.fin();
        check(s, Ending::idle_close_by_local);
    }
    SECTION("not answered")
    {
        s.fin();
        check(s, Ending::unclassified);
    }
    SECTION("reset")
    {
        s.reset();
        check(s, Ending::unclassified);
    }
}

// ----------------------------------------------------------------------------------------------------------- opening

TEST_CASE("connections that don't open", "[classify]")
{
    constexpr Expected refused{Cause::connect_refused, Variant::none, Certainty::proven};
    constexpr Expected timeout{Cause::connect_timeout, Variant::none, Certainty::proven};
    constexpr Expected gave_up{Cause::connect_timeout, Variant::gave_up, Certainty::proven};
    DrivenSocket trace(Backend::trace);
    DrivenSocket cgroup(Backend::cgroup);
    for (DrivenSocket* s : {&trace, &cgroup}) {
        s->connect();
        s->wait_ms(300);
    }
    SECTION("refused")
    {
        trace.open_fails(true, ECONNREFUSED);
        check(trace, refused);
        cgroup.open_fails(true, 0);
        check(cgroup, refused);
    }
    SECTION("refused after a SYN that was lost")
    {
        trace.retransmits = 1;
        trace.open_fails(true, ECONNREFUSED);
        check(trace, refused);
    }
    SECTION("the kernel gave up")
    {
        trace.retransmits = 6;
        trace.open_fails(false, ETIMEDOUT);
        check(trace, timeout);
        // cgroup sees no error: it may have been ICMP.
        cgroup.retransmits = 6;
        cgroup.open_fails(false, ETIMEDOUT);
        check(cgroup, {Cause::connect_timeout, Variant::none, Certainty::possible});
    }
    SECTION("the process gave up: with a SYN retransmitted, or too early to tell")
    {
        const auto retransmits = GENERATE(0U, 1U);
        for (DrivenSocket* s : {&trace, &cgroup}) {
            s->retransmits = retransmits;
            s->close();
            s->open_fails(false, 0);
            if (retransmits == 0)
                check(*s, Ending::unclassified);
            else
                check(*s, gave_up);
        }
    }
    SECTION("unreachable")
    {
        trace.retransmits = GENERATE(0U, 1U, 2U);
        if (GENERATE(true, false)) // an error of its own is no patience that ran out
            trace.close();
        const int error = GENERATE(ENETUNREACH, EHOSTUNREACH, EHOSTDOWN, ENONET, ECONNREFUSED, ENOPROTOOPT, EOPNOTSUPP,
                                   EPROTO, EACCES);
        trace.open_fails(false, static_cast<std::uint16_t>(error));
        check(trace, {Cause::connect_unreachable, Variant::none,
                      error == ECONNREFUSED ? Certainty::likely : Certainty::proven});
        // cgroup sees no error, but who ended it, and when: later it may have been the retransmissions' own end, or a
        // process that disconnected.
        cgroup.retransmits = trace.retransmits;
        cgroup.open_fails(false, static_cast<std::uint16_t>(error));
        if (cgroup.retransmits == 0)
            check(cgroup, {Cause::connect_unreachable, Variant::none, Certainty::possible});
        else
            check(cgroup, {Cause::connect_timeout, Variant::none, Certainty::possible});
    }
    SECTION("disconnected by its process (HAProxy's shutdown()), after a SYN's retransmission or before")
    {
        trace.retransmits = GENERATE(0U, 1U);
        trace.open_fails(false, 0);
        if (trace.retransmits == 0)
            check(trace, Ending::unclassified);
        else
            check(trace, gave_up);
        cgroup.retransmits = 1; // an ICMP error looks the same
        cgroup.open_fails(false, 0);
        check(cgroup, {Cause::connect_timeout, Variant::none, Certainty::possible});
    }
    SECTION("given up before the SYN's retransmission: after half a second it is patience that ran out")
    {
        const auto ms = GENERATE(199U, 200U, 701U);
        const bool closes = GENERATE(true, false);
        for (DrivenSocket* s : {&trace, &cgroup}) {
            s->wait_ms(ms);
            if (closes)
                s->close();
            s->open_fails(false, 0);
        }
        constexpr Expected likely{Cause::connect_timeout, Variant::gave_up, Certainty::likely};
        constexpr Expected possible{Cause::connect_timeout, Variant::gave_up, Certainty::possible};
        if (ms < 200) {
            check(trace, Ending::unclassified);
            if (!closes)
                check(cgroup, {Cause::connect_unreachable, Variant::none, Certainty::possible});
        } else {
            check(trace, likely);
            check(cgroup, closes ? likely : possible);
        }
    }
    SECTION("disconnected by this host")
    {
        trace.open_fails(false, static_cast<std::uint16_t>(GENERATE(ECONNRESET, ECONNABORTED)));
        check(trace, Ending::unclassified);
    }
    SECTION("its SYN older than the tracer: how long is not said")
    {
        DrivenSocket s;
        s.connect_unfollowed();
        s.adopt();
        s.open_fails(true, ECONNREFUSED);
        const auto c = ending_of(s, unlearned);
        check(c, refused);
        CHECK(c.verdict->message.find(" ms") == std::string::npos);
    }
}

// -------------------------------------------------------------------------------------------- lost and missed events

TEST_CASE("a lost event is made up for by the last one, which says so", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    SECTION("FIN")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_FIN};
        s.wait_ms(20);
        s.fin(0U);
        s.wait_ms(500); // the end comes later; when the FIN came is kept
        check(s, incomplete(fin_crossed));
    }
    SECTION("FIN in part, within the window although the end is not")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_FIN};
        s.wait_ms(20);
        s.fin(99U);
        s.wait_ms(500);
        check(s, incomplete(fin_crossed_in_part));
    }
    SECTION("FIN, and then an RST")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_FIN, EVENT_PEER_RESET};
        s.fin(0U);
        s.wait_ms(20);
        s.reset({.answers = ResetOptions::Answers::before_fin});
        check(s, incomplete(fin_crossed));
    }
    SECTION("the RST after a FIN that was judged")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_RESET};
        s.fin(0U);
        s.wait_ms(20);
        s.reset({.answers = ResetOptions::Answers::before_fin});
        check(s, fin_crossed); // nothing was lost before it
    }
    SECTION("RST")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_RESET};
        s.reset({.acknowledges = 0U});
        check(s, incomplete(reset_crossed));
    }
    SECTION("RST in a response")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_PEER_RESET};
        s.receive(10);
        s.reset({.acknowledges = 100U});
        check(s, incomplete(response_cut));
    }
    SECTION("the send after a FIN")
    {
        DrivenSocket s = used(1, backend);
        s.ring_full_for = {EVENT_SENT_AFTER_FIN};
        s.wait_ms(1000);
        s.fin();
        s.request(100);
        s.wait_ms(20);
        s.reset({.answers = ResetOptions::Answers::after_fin});
        check(s, incomplete(stale_reuse));
    }
    SECTION("FIN and RST around a send that was judged: no second verdict")
    {
        DrivenSocket s = used(1, backend);
        s.ring_full_for = {EVENT_PEER_FIN, EVENT_PEER_RESET};
        s.wait_ms(1000);
        s.fin();
        s.request(100);
        s.wait_ms(20);
        s.reset({.answers = ResetOptions::Answers::after_fin});
        check(s, incomplete(stale_reuse));
    }
    SECTION("a FIN that made no name, and a send after it")
    {
        DrivenSocket s = used(1, backend);
        s.ring_full_for = {EVENT_PEER_FIN};
        s.wait_ms(1000);
        s.request(100);
        s.receive(50, 0U);
        s.fin(0U);
        s.request(100);
        check(s, Ending::unclassified);
    }
    SECTION("a FIN that came while the kernel skipped the program")
    {
        DrivenSocket s = used(1, backend);
        s.wait_ms(5000);
        connection_missed_fin(&s.c);
        s.shutdown();
        CHECK((s.c.flags & CONNECTION_LOCAL_FIRST) == 0);
        s.local_fin_acknowledged();
        s.times_out();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned).empty());
        CHECK(s.last().connection.lost_events == 1);
        DrivenSocket unanswered = requested(2000, 100, backend);
        connection_missed_fin(&unanswered.c);
        unanswered.shutdown();
        unanswered.local_fin_acknowledged();
        unanswered.times_out();
        check(unanswered, Ending::unclassified);
    }
    SECTION("the opening alone")
    {
        DrivenSocket s(backend);
        s.ring_full_for = {EVENT_OPENED};
        s.open();
        s.wait_ms(500);
        s.request(100);
        s.fin(0U);
        check(s, incomplete(fin_crossed));
    }
    SECTION("this host's FIN")
    {
        DrivenSocket s = requested(2000, 100, backend);
        s.ring_full_for = {EVENT_LOCAL_FIN};
        s.close();
        s.local_fin_acknowledged();
        s.fin();
        check(s, Ending::unclassified);
    }
}

TEST_CASE("what became of connections older than the tracer", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    DrivenSocket s(backend);
    s.open_unfollowed();
    s.request(100);
    s.receive(1000);

    SECTION("idle when adopted: a request on it is a reuse, and all of it was seen")
    {
        s.wait_ms(2000);
        s.adopt();
        s.wait_ms(10);
        s.request(100);
        s.fin(0U);
        check(s, fin_crossed);
    }
    SECTION("idle close: taught with the time before the tracer")
    {
        s.wait_ms(4000);
        s.adopt();
        s.wait_ms(1000);
        s.fin();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned) == std::vector{5000U});
    }
    SECTION("adopted in mid-response, closed right after it: no idle close, nothing taught")
    {
        s.adopt();
        s.receive(500);
        s.wait_ms(99);
        DrivenSocket rested = s;
        s.fin();
        check(s, Ending::complete_close);
        CHECK(learned_from(s, unlearned).empty());
        // An RST may have cut a response whose beginning was not seen.
        rested.reset();
        check(rested, Ending::unclassified);
        CHECK(learned_from(rested, unlearned).empty());
    }
    SECTION("reset after a rest")
    {
        s.wait_ms(800);
        s.adopt();
        s.wait_ms(100);
        s.reset();
        check(s, Ending::idle_close_by_peer);
        CHECK(learned_from(s, unlearned) == std::vector{900U});
    }
    SECTION("a request under way: how much of it was acknowledged before is not known")
    {
        s.wait_ms(2000);
        s.request(100);
        s.acknowledge(40U);
        s.wait_ms(10);
        s.adopt();
        s.wait_ms(10);
        SECTION("none of the rest acknowledged")
        {
            s.fin(40U);
            check(s, incomplete(with(fin_crossed_in_part, Certainty::likely)));
        }
        SECTION("all acknowledged, not answered: the rest before it is not known")
        {
            s.fin();
            check(s, incomplete(with(closed_reused, Certainty::possible)), upstream_with_timer(2000));
        }
        SECTION("the same, much later")
        {
            s.wait_ms(1000);
            s.fin();
            check(s, incomplete(closed_reused));
        }
        SECTION("bare RST")
        {
            s.reset();
            check(s, incomplete(with(reset_closed, Certainty::possible)));
        }
        SECTION("answered, and the next one crosses: seen in whole")
        {
            s.receive(10);
            s.wait_ms(1000);
            s.request(10);
            s.fin(0U);
            check(s, fin_crossed);
        }
    }
    SECTION("an upload under way is no race")
    {
        s.request(1'000'000);
        s.acknowledge(900'000U);
        s.adopt();
        s.fin(900'000U);
        check(s, Ending::unclassified);
    }
    SECTION("in CLOSE_WAIT: when the FIN came is not known")
    {
        s.wait_ms(1000);
        s.fin();
        s.wait_ms(1000);
        s.adopt();
        DrivenSocket left_alone = s;
        s.request(100);
        check(s, incomplete(with(stale_reuse, Certainty::likely)));
        check(left_alone, Ending::none); // nor what it met
        CHECK(learned_from(left_alone, unlearned).empty());
    }
    SECTION("closed by this host before: what follows teaches nothing of the upstream")
    {
        s.wait_ms(300);
        s.shutdown();
        s.local_fin_acknowledged();
        s.adopt();
        s.wait_ms(700);
        s.fin();
        check(s, Ending::idle_close_by_local);
        CHECK(learned_from(s, unlearned).empty());
    }
    SECTION("never used before it was adopted: how long it has been open is not known")
    {
        DrivenSocket fresh(backend);
        fresh.open_unfollowed();
        fresh.adopt();
        fresh.wait_ms(10);
        fresh.request(100);
        DrivenSocket crossing = fresh;
        fresh.fin();
        check(fresh, closed_reused); // likely, where a fresh one would be proven
        crossing.fin(0U);
        check(crossing, fin_crossed); // and none on accept
    }
}

TEST_CASE("an accepted connection gets no verdict and counts for no upstream", "[classify]")
{
    DrivenSocket s(Backend::trace, 1000, false);
    s.open();
    s.receive(100);
    s.send(1000);
    SECTION("the client half-closes and is answered")
    {
        s.receive(100);
        s.fin();
        s.send(1000);
        CHECK(s.last().kind == EVENT_SENT_AFTER_FIN);
    }
    SECTION("the client resets")
    {
        s.reset();
    }
    check(s, Ending::none);
    Upstreams upstreams;
    for (const event& e : s.events)
        CHECK(account(e, upstreams).ending == Ending::none);
    CHECK(upstreams.size() == 0);
}

// ----------------------------------------------------------------------------------------------------------- counting

namespace {

/// All of a connection's life, to its end.
DrivenSocket accounted_life(DrivenSocket s, Upstreams& upstreams)
{
    end(s);
    for (const event& e : s.events)
        account(e, upstreams);
    return s;
}

} // namespace

TEST_CASE("everything is counted once per upstream", "[classify]")
{
    Upstreams upstreams;
    const auto live = [&](DrivenSocket s) { return accounted_life(std::move(s), upstreams); };
    for (std::uint64_t i = 0; i < 5; ++i) {
        DrivenSocket idle = used(2, Backend::trace, i * 1000);
        idle.wait_ms(3000);
        idle.fin();
        live(idle);
    }
    DrivenSocket race = requested(2990);
    race.fin(0U);
    live(race);
    DrivenSocket stale = requested(100);
    stale.receive(1);
    stale.wait_ms(3000);
    stale.fin();
    stale.request(100);
    live(stale);
    DrivenSocket complete = used();
    complete.fin();
    live(complete);
    live(used());
    live(requested(10));
    DrivenSocket refused;
    refused.connect();
    refused.open_fails(true, ECONNREFUSED);
    const event key = live(refused).last();

    REQUIRE(upstreams.size() == 1);
    const Upstream& upstream = upstreams.at(UpstreamKey::of(key));
    CHECK(upstream.counts.opened == 10);
    CHECK(upstream.counts.closed == 10);
    CHECK(upstream.counts.open_failed == 1);
    CHECK(upstream.counts.idle_closes_by_peer == 5);
    CHECK(upstream.counts.idle_closes_by_local == 1);
    CHECK(upstream.counts.complete_closes == 1);
    CHECK(upstream.counts.unclassified == 1);
    CHECK(upstream.counts.verdicts.at(Cause::keepalive_race) == 1);
    CHECK(upstream.counts.verdicts.at(Cause::stale_reuse) == 1);
    CHECK(upstream.counts.verdicts.at(Cause::connect_refused) == 1);
    CHECK(upstream.counts.verdicts.size() == 3);
    CHECK(upstream.counts.exchanges == 5 * 2 + 2 + 3 + 1 + 1 + 2);
    CHECK(upstream.longest_reused_idle_ms == 3000);
    REQUIRE(upstream.idle_timeout.timeout());
    CHECK(upstream.idle_timeout.timeout()->ms == 3000);
    CHECK(upstream.idle_timeout.samples() == 7); // the stale reuse's FIN, and the crossing
}

TEST_CASE("this host's own idle limit is learned from its own closes", "[classify]")
{
    const auto backend = GENERATE(Backend::trace, Backend::cgroup);
    Upstreams upstreams;
    event last{};
    const auto end = [&](std::uint64_t number, std::uint64_t rest_ms, bool by_reset) {
        DrivenSocket s = used(2, backend, number * 1000);
        s.wait_ms(rest_ms);
        if (by_reset) // with something unread: the upstream's farewell
            s.local_reset();
        last = accounted_life(s, upstreams).last();
    };
    const auto upstream = [&]() -> const Upstream& { return upstreams.at(UpstreamKey::of(last)); };
    SECTION("after a rest")
    {
        for (std::uint64_t i = 0; i < 3; ++i)
            end(i, 3000, false);
        REQUIRE(upstream().own_idle_limit.timeout());
        CHECK(upstream().own_idle_limit.timeout()->ms == 3000);
        CHECK(upstream().kept_idle == 3);
        CHECK(upstream().rests.count() == 3);
        CHECK(!upstream().idle_timeout.timeout());
    }
    SECTION("at once: nothing was kept")
    {
        for (std::uint64_t i = 0; i < 3; ++i)
            end(i, 99, false);
        CHECK(upstream().own_idle_limit.samples() == 0);
        CHECK(upstream().kept_idle == 0);
        end(4, 100, false);
        CHECK(upstream().own_idle_limit.samples() == 1);
    }
    SECTION("by a reset: the upstream may have closed first")
    {
        for (std::uint64_t i = 0; i < 3; ++i)
            end(i, 3000, true);
        CHECK(upstream().own_idle_limit.samples() == 0);
        CHECK(upstream().kept_idle == 3);
    }
}

TEST_CASE("of upstreams beyond the limit nothing is learned together", "[classify]")
{
    Upstreams upstreams(0);
    event last{};
    for (std::uint64_t i = 0; i < 5; ++i) {
        DrivenSocket idle = used(2, Backend::trace, i * 1000);
        idle.wait_ms(3000);
        idle.fin();
        idle.close();
        idle.local_fin_acknowledged();
        for (const event& e : idle.events)
            account(e, upstreams);
        last = idle.last();
    }
    const Upstream& other = upstreams.at(UpstreamKey::of(last));
    CHECK(upstreams.is_other(other));
    CHECK(other.counts.idle_closes_by_peer == 5);
    CHECK(other.idle_timeout.samples() == 0);
}

TEST_CASE("what is mended at either end shows while a run goes on", "[classify][exposure]")
{
    Upstreams upstreams;
    event last{};
    std::uint64_t after_ms = 0;
    const auto told = [&](DrivenSocket& s) {
        for (const event& e : s.events)
            account(e, upstreams);
        last = s.last();
    };
    const auto closed = [&](bool by_upstream, std::uint64_t rest_ms, std::uint64_t reused_after_ms) {
        DrivenSocket s = used(1, Backend::trace, after_ms += 60'000);
        s.wait_ms(reused_after_ms);
        s.request(100);
        s.receive(500);
        s.wait_ms(rest_ms);
        if (by_upstream)
            s.fin();
        s.close();
        if (!by_upstream)
            s.fin();
        s.local_fin_acknowledged();
        told(s);
    };
    const auto upstream = [&]() -> const Upstream& { return upstreams.at(UpstreamKey::of(last)); };
    const auto state = [&] { return exposure_of(upstream(), 86'400'000'000'000, {}, {}).state; };
    for (int i = 0; i < 10; ++i)
        closed(true, 5000, 4900);
    REQUIRE(upstream().idle_timeout.timeout());
    CHECK(upstream().idle_timeout.timeout()->ms == 5000);
    CHECK(state() == PoolState::exposed);
    SECTION("this host closes after four seconds: first what was open before, and had rested for longer")
    {
        for (int i = 0; i < 5; ++i)
            closed(false, 4000, 4900);
        for (int i = 0; i < 34; ++i)
            closed(false, 4000, 3900);
        CHECK(state() == PoolState::exposed);
        for (int i = 0; i < 6; ++i)
            closed(false, 4000, 3900);
        CHECK(state() == PoolState::safe);
        closed(true, 5000, 3900);
        CHECK(state() == PoolState::exposed);
    }
    SECTION("the upstream waits for longer, and connections in use rest only before this host closes them")
    {
        for (int i = 0; i < 19; ++i)
            closed(false, 60'000, 10);
        CHECK(upstream().idle_timeout.timeout());
        closed(false, 60'000, 10);
        CHECK_FALSE(upstream().idle_timeout.timeout());
    }
    SECTION("what was never used, or for one answer, rested by another timer perhaps")
    {
        for (int i = 0; i < 40; ++i) {
            DrivenSocket s = used(i % 2, Backend::trace, after_ms += 60'000); // of none, or of one request
            s.wait_ms(60'000);
            s.close();
            s.fin();
            s.local_fin_acknowledged();
            told(s);
        }
        CHECK(upstream().idle_timeout.timeout());
    }
    SECTION("the upstream waits for longer")
    {
        for (int i = 0; i < 19; ++i)
            closed(false, 60'000, 30'000);
        CHECK(upstream().idle_timeout.timeout());
        closed(false, 60'000, 30'000);
        CHECK_FALSE(upstream().idle_timeout.timeout());
        CHECK(state() == PoolState::safe);
    }
}

TEST_CASE("an upstream that closes by RST and changes its timer is learned anew", "[classify]")
{
    Upstreams upstreams;
    event last{};
    std::uint64_t opened_after_ms = 0;
    const auto idle_close = [&](std::uint64_t ms) {
        DrivenSocket s = used(1, Backend::trace, opened_after_ms += 1000);
        s.wait_ms(ms);
        s.reset({.acknowledges = 100U});
        for (const event& e : s.events)
            account(e, upstreams);
        last = s.last();
    };
    for (int i = 0; i < 10; ++i)
        idle_close(2000);
    CHECK(upstreams.at(UpstreamKey::of(last)).idle_timeout.timeout()->ms == 2000);
    for (int i = 0; i < 100; ++i)
        idle_close(65'000);
    CHECK(upstreams.at(UpstreamKey::of(last)).idle_timeout.timeout()->ms == 65'000);
    CHECK(upstreams.at(UpstreamKey::of(last)).counts.verdicts.empty());
}

// -------------------------------------------------------------------------------------------------------------- causes

TEST_CASE("every cause has its text, and ids read back", "[classify]")
{
    constexpr Cause all[] = {
        Cause::keepalive_race,   Cause::stale_reuse,       Cause::upstream_closed,     Cause::upstream_reset,
        Cause::response_cut,     Cause::path_dropped,      Cause::accept_stalled,      Cause::connect_refused,
        Cause::request_rejected, Cause::connect_timeout,   Cause::connect_unreachable, Cause::proxy_timeout,
        Cause::client_abort,     Cause::closed_on_request, Cause::server_cut_response, Cause::accept_overflow,
        Cause::stale_response,   Cause::handshake_failed,  Cause::upstream_benched};
    CHECK(cause_texts().size() == std::size(all));
    for (const Cause cause : all) {
        CAPTURE(cause);
        CHECK(text_of(cause).cause == cause);
        CHECK(cause_from_string(to_string(cause)) == cause);
        CHECK(!text_of(cause).title.empty());
        CHECK(!text_of(cause).happened.empty());
        CHECK(!text_of(cause).evidence.empty());
        CHECK(!text_of(cause).proxy_says.empty());
        CHECK(!text_of(cause).remedy.empty());
        CHECK(text_of(cause).by_trace_alone ==
              (text_of(cause).evidence.find("ackend trace alone sees that") != std::string_view::npos));
    }
    CHECK(!cause_from_string("keepalive"));
    CHECK(!cause_from_string(""));
    // Each variant is explained where its cause is.
    for (const Variant variant : {Variant::fin_crossed, Variant::fin_lingering, Variant::reset_crossed,
                                  Variant::reset_unread, Variant::reset_closed})
        CHECK(text_of(Cause::keepalive_race).evidence.find(to_string(variant)) != std::string_view::npos);
    CHECK(text_of(Cause::upstream_closed).evidence.find(to_string(Variant::on_accept)) != std::string_view::npos);
    CHECK(text_of(Cause::connect_timeout).evidence.find(to_string(Variant::gave_up)) != std::string_view::npos);
    CHECK(to_string(Variant::none).empty());
    for (const Variant variant : {Variant::fin_crossed, Variant::fin_lingering, Variant::reset_crossed,
                                  Variant::reset_unread, Variant::reset_closed})
        CHECK(cause_of_variant(to_string(variant)) == Cause::keepalive_race);
    CHECK(cause_of_variant("on_accept") == Cause::upstream_closed);
    CHECK(cause_of_variant("gave_up") == Cause::path_dropped); // and connect_timeout's as well
    CHECK(cause_of_variant("early_answer") == Cause::request_rejected);
    CHECK(cause_of_variant("unanswered_probes") == Cause::path_dropped);
    for (const std::string_view none : {"", "request", "fin", "keepalive_race"})
        CHECK_FALSE(cause_of_variant(none));
}

// --------------------------------------------------------------------------------------------------------- random
// lives

namespace {

/// A random life of a connection, and what is true of it.
struct Life {
    DrivenSocket socket;
    bool adopted = false;
    bool unanswered = false;   ///< at its end a send had met no answer
    bool reset = false;        ///< by the peer
    bool early_answer = false; ///< came before the request's end
    bool given_up = false;     ///< closed by this host while a send had met no answer
    std::string story;         ///< for the report of a failure
};

class LifeMaker {
public:
    explicit LifeMaker(std::uint32_t seed) : random_(seed) {}

    Life make()
    {
        const Backend backend = chance(50) ? Backend::trace : Backend::cgroup;
        const std::uint32_t first_seq = chance(20) ? 0xffffffffU - below(3000) : below(0xffffffffU);
        Life life{.socket = DrivenSocket(backend, first_seq, !chance(10)), .story = {}};
        life_ = &life;
        DrivenSocket& s = life.socket;
        if (chance(30))
            s.tick_ns = 4 * DrivenSocket::ms;
        s.srtt_us = chance(50) ? below(100'000) : 0;
        if (chance(40))
            for (unsigned kind = EVENT_OPENED; kind < EVENT_KINDS; ++kind)
                if (chance(35))
                    s.ring_full_for.insert(kind);
        life.adopted = chance(25);
        if (life.adopted)
            say("older"), s.open_unfollowed();
        else if (s.client && chance(5))
            return fail_to_open();
        else
            say("open"), s.open();
        following_ = !life.adopted;
        adopt_after_ = below(8);
        for (step_ = 0; s.state() != TCP_STATE_CLOSE && step_ < 60; ++step_)
            step();
        end();
        return life;
    }

private:
    std::uint32_t below(std::uint32_t limit)
    {
        return std::uniform_int_distribution<std::uint32_t>(0, limit - 1)(random_);
    }
    bool chance(unsigned percent) { return below(100) < percent; }
    void say(const std::string& what) { life_->story += ' ' + what; }

    Life fail_to_open()
    {
        DrivenSocket& s = life_->socket;
        s.connect();
        s.wait_ms(below(3000));
        s.retransmits = below(3);
        if (chance(30))
            s.close();
        const bool refused = chance(40);
        life_->reset = true; // a verdict is in order
        s.open_fails(refused, refused ? ECONNREFUSED : chance(50) ? ETIMEDOUT : 0);
        say("fails to open");
        return std::move(*life_);
    }

    void rest()
    {
        static constexpr std::uint64_t rests_ns[] = {
            0,           1'000,       1'000'000,     40'000'000,    99'000'000,
            150'000'000, 899'000'000, 1'000'000'000, 5'000'000'000, 60'000'000'000};
        life_->socket.wait_ns(rests_ns[below(std::size(rests_ns))]);
        life_->socket.retransmits += life_->unanswered && chance(30) ? 1 : 0;
    }

    std::optional<std::uint32_t> some_of_request()
    {
        if (sent_ == 0 || chance(40))
            return std::nullopt;
        acknowledged_ = chance(30) ? acknowledged_ : acknowledged_ + below(sent_ - acknowledged_ + 1);
        return acknowledged_;
    }

    void step()
    {
        DrivenSocket& s = life_->socket;
        if (!following_ && step_ >= adopt_after_) {
            say("adopt");
            s.adopt();
            following_ = true;
        }
        rest();
        const auto state = s.state();
        const bool may_send = state == TCP_STATE_ESTABLISHED || state == TCP_STATE_CLOSE_WAIT;
        const bool may_receive =
            state == TCP_STATE_ESTABLISHED || state == TCP_STATE_FIN_WAIT1 || state == TCP_STATE_FIN_WAIT2;
        const unsigned what = below(100);
        if (what < 35 && may_send) {
            const std::uint32_t bytes = chance(10) ? 1 + below(200'000) : 1 + below(500);
            if (life_->unanswered && chance(80)) {
                say("more");
                s.send(bytes);
                sent_ += bytes;
            } else {
                say("request");
                s.request(bytes);
                sent_ = bytes;
                acknowledged_ = 0;
            }
            life_->unanswered = true;
        } else if (what < 75 && may_receive) {
            say("receive");
            const auto acknowledges = chance(80) ? std::nullopt : some_of_request();
            s.receive(1 + below(5000), acknowledges);
            life_->early_answer |= acknowledges.value_or(sent_) < sent_;
            life_->unanswered = false;
        } else if (what < 83 && may_receive) {
            say("fin");
            s.fin(life_->unanswered ? some_of_request() : std::nullopt);
        } else if (what < 86 && following_) {
            say("reset");
            life_->reset = true;
            ResetOptions options{.answers =
                                     chance(50) ? ResetOptions::Answers::before_fin : ResetOptions::Answers::after_fin};
            if (chance(60))
                options.acknowledges = chance(50) ? sent_ : acknowledged_;
            options.header_seen = !chance(10);
            s.reset(options);
        } else if (what < 90 && may_send) {
            say("close");
            life_->given_up |= life_->unanswered;
            chance(50) ? s.close() : s.shutdown();
        } else if (what < 91 && following_) {
            say("abort");
            s.abort();
        } else if (what < 92 && following_) {
            say("local reset");
            s.local_reset();
        } else if (what < 93 && following_) {
            say("time-out");
            s.times_out();
        } else if (what < 97 &&
                   (state == TCP_STATE_FIN_WAIT1 || state == TCP_STATE_LAST_ACK || state == TCP_STATE_CLOSING)) {
            say("ack");
            s.local_fin_acknowledged();
        }
    }

    void end()
    {
        DrivenSocket& s = life_->socket;
        if (!following_ || !s.open_still())
            return;
        say("end");
        s.close();
        if (s.open_still())
            s.local_fin_acknowledged();
        if (s.open_still())
            s.fin();
    }

    std::mt19937 random_;
    Life* life_ = nullptr;
    bool following_ = true;
    unsigned step_ = 0;
    unsigned adopt_after_ = 0;
    std::uint32_t sent_ = 0;
    std::uint32_t acknowledged_ = 0;
};

} // namespace

TEST_CASE("random lives end once, and without a verdict where nothing failed", "[classify]")
{
    constexpr std::uint32_t lives = 40'000;
    Upstreams upstreams;
    std::size_t verdicts = 0;
    std::size_t ended = 0;
    for (std::uint32_t seed = 1; seed <= lives; ++seed) {
        const Life life = LifeMaker(seed).make();
        const DrivenSocket& s = life.socket;
        unsigned endings = 0;
        bool verdict = false;
        for (const event& e : s.events) {
            const Classification c = account(e, upstreams);
            endings += c.ending != Ending::none ? 1 : 0;
            if (!c.verdict)
                continue;
            verdict = true;
            if (e.connection.lost_events > 0 && !c.verdict->incomplete)
                FAIL("seed " << seed << ": lost events, and complete:" << life.story);
        }
        if (endings > 1)
            FAIL("seed " << seed << ": " << endings << " endings:" << life.story);
        if (verdict && (!s.client || (!life.unanswered && !life.given_up && !life.early_answer && !life.reset)))
            FAIL("seed " << seed << ": a verdict where nothing failed:" << life.story);
        const bool seen_in_whole = s.client && !life.adopted && s.ring_full_for.count(EVENT_CLOSED) == 0 &&
                                   s.ring_full_for.count(EVENT_OPEN_FAILED) == 0;
        if (seen_in_whole && endings != 1)
            FAIL("seed " << seed << ": ended, and not counted:" << life.story);
        verdicts += verdict ? 1 : 0;
        ended += endings;
    }
    // The lives are worth something: a good part fails, a good part does not.
    CHECK(verdicts > lives / 20);
    CHECK(ended > lives / 2);
    CHECK(verdicts < ended);
}
