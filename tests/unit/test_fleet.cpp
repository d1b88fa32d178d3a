// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Many hosts' words as one diagnosis, and a verdict's record read back.
#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/fleet.h"
#include "sink/facts.h"
#include "sink/json.h"
#include "sink/record_reader.h"
#include "sink/report.h"
#include "sink/story.h"
#include "source/clickhouse.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint64_t second = 1'000'000'000;

FleetGroup group_of(const char* host, Cause cause = Cause::keepalive_race)
{
    FleetGroup group;
    group.where = UpstreamKey::of(crossing());
    group.cause = cause;
    group.certainty = Certainty::likely;
    group.rested = true;
    group.host = host;
    group.verdicts = group.affected = 2;
    group.times_ns = {10 * second, 20 * second};
    group.bursts = {{10 * second, 10 * second}, {20 * second, 20 * second}};
    group.last_ns = 20 * second;
    return group;
}

ServerSays server_says(const char* host = "app-1")
{
    return {.host = host,
            .cause = Cause::closed_on_request,
            .late = false,
            .proven = true,
            .whole = true,
            .reset = true,
            .killed = false};
}

Pool pool_of(const char* host, PoolState state, std::uint64_t requests)
{
    Pool pool;
    pool.where = UpstreamKey::of(crossing());
    pool.requests = requests;
    pool.connections = requests / 10;
    pool.exposure.state = state;
    pool.hosts[host] = state;
    return pool;
}

/// As a store gives it back: on one level, with null where there is nothing.
nlohmann::json stored(const Json& record)
{
    nlohmann::json row = nlohmann::json::parse(to_line(flattened(record)));
    row["http.response.status_code"] = nullptr;
    return row;
}

const Origin origin{.host_name = "proxy-1", .clock = WallClock(0)};

std::string story(const Sighting& sighting)
{
    std::string text;
    for (const Moment& moment : moments_of(sighting))
        text += fmt::format("{:.3f} {} {}\n", moment.ms, moment.what, moment.shows);
    return text;
}

} // namespace

TEST_CASE("failures of one cause at one upstream are one finding, on whichever hosts")
{
    Fleet fleet;
    fleet.add(group_of("a"));
    FleetGroup other = group_of("b");
    other.verdicts = 3;
    other.certainty = Certainty::proven;
    other.times_ns = {9 * second, 10 * second, 11 * second};
    other.bursts = {{9 * second, 11 * second}};
    fleet.add(other);
    fleet.add(group_of("a", Cause::connect_refused));
    const Diagnosis diagnosis = std::move(fleet).diagnosis();
    REQUIRE(diagnosis.findings().size() == 2);
    const Finding& races = *diagnosis.findings().front();
    CHECK(races.cause == Cause::keepalive_race);
    CHECK(races.verdicts == 5);
    CHECK(races.hosts == std::map<std::string, std::uint64_t>{{"a", 2}, {"b", 3}});
    CHECK(races.certainties == std::map<Certainty, std::uint64_t>{{Certainty::proven, 3}, {Certainty::likely, 2}});
    CHECK(races.first_ns == 9 * second);
    CHECK(races.times_ns.size() == 5);
    CHECK(races.bursts == 2); // those of the two hosts that overlap are one
    CHECK(races.burst_ns == 20 * second);
}

TEST_CASE("what both ends tell of is one verdict, with the stronger evidence")
{
    struct Case {
        Cause told;
        bool whole;
        bool late;
        bool killed;
        bool incomplete;
        Cause cause;
        Certainty certainty;
    };
    const Case cases[] = {
        {Cause::upstream_closed, true, false, false, false, Cause::keepalive_race, Certainty::proven},
        {Cause::upstream_reset, true, false, false, false, Cause::keepalive_race, Certainty::proven},
        {Cause::upstream_reset, true, false, true, false, Cause::upstream_reset, Certainty::proven},
        {Cause::keepalive_race, false, true, false, false, Cause::keepalive_race, Certainty::proven},
        {Cause::keepalive_race, true, false, true, false, Cause::upstream_reset, Certainty::proven},
        {Cause::keepalive_race, true, false, false, false, Cause::keepalive_race, Certainty::proven},
        {Cause::upstream_closed, false, true, false, false, Cause::upstream_closed, Certainty::likely},
        {Cause::upstream_closed, false, false, false, false, Cause::upstream_closed, Certainty::likely},
        {Cause::upstream_closed, true, false, false, true, Cause::upstream_closed, Certainty::likely},
        {Cause::connect_refused, true, false, false, false, Cause::connect_refused, Certainty::likely},
    };
    for (const Case& one : cases) {
        Fleet fleet;
        FleetGroup group = group_of("a", one.told);
        group.server = server_says();
        group.server->whole = one.whole;
        group.server->late = one.late;
        group.server->killed = one.killed;
        group.incomplete = one.incomplete;
        group.instance = 7;
        group.server_message = "It lay unread.";
        fleet.add(group);
        CHECK(fleet.instances() == std::vector<std::uint64_t>{7});
        fleet.instance(7, {.e = crossing(),
                           .last = crossing(),
                           .verdict = {.cause = one.told, .message = "It died."},
                           .outcome = {},
                           .process = {},
                           .clock_offset_ns = 0});
        const Diagnosis diagnosis = std::move(fleet).diagnosis();
        REQUIRE(diagnosis.findings().size() == 1);
        const Finding& finding = *diagnosis.findings().front();
        CHECK(finding.cause == one.cause);
        CHECK(finding.certainties == std::map<Certainty, std::uint64_t>{{one.certainty, 2}});
        CHECK(finding.upstream_hosts == std::map<std::string, std::uint64_t>{{"app-1", 2}});
        CHECK(finding.instance.verdict.cause == one.cause);
        CHECK(finding.instance.verdict.message == "It died. app-1 says: It lay unread.");
        if (one.cause != one.told)
            CHECK(finding.instance.verdict.variant == Variant::reset_unread);
    }
}

TEST_CASE("hosts' pools at one upstream are one: the worst of them, and what all of them come to")
{
    Fleet fleet;
    fleet.add(pool_of("a", PoolState::safe, 1000));
    Pool exposed = pool_of("b", PoolState::exposed, 100);
    exposed.exposure.races_a_day = 4;
    exposed.exposure.share = 0.1;
    exposed.exposure.told_by = 9;
    exposed.upstream.idle_timeout =
        IdleTimeoutLearner({.ms = 5000, .lowest_ms = 4999, .highest_ms = 5001, .samples = 8});
    fleet.add(exposed);
    exposed.hosts = {{"c", PoolState::exposed}};
    fleet.add(exposed);
    const Diagnosis diagnosis = std::move(fleet).diagnosis();
    REQUIRE(diagnosis.pools().size() == 1);
    const Pool& pool = *diagnosis.pools().front();
    CHECK(pool.exposure.state == PoolState::exposed);
    CHECK(pool.requests == 1200);
    CHECK(pool.connections == 120);
    CHECK(pool.hosts.size() == 3);
    CHECK(pool.exposure.races_a_day == 8);
    CHECK(pool.exposure.told_by == 18);
    CHECK(pool.exposure.share == Approx(20.0 / 1200));
    CHECK(pool.timeout()->ms == 5000);
}

TEST_CASE("of several hosts' timers the learned one counts; of those that were told, the worst pool's")
{
    const auto pool_with = [](const char* host, PoolState state, std::uint32_t timer_ms, std::uint32_t samples) {
        Pool pool = pool_of(host, state, 100);
        pool.upstream.idle_timeout =
            IdleTimeoutLearner({.ms = timer_ms, .lowest_ms = timer_ms, .highest_ms = timer_ms, .samples = samples});
        return pool;
    };
    const auto timer_of = [](const std::vector<Pool>& pools) {
        Fleet fleet;
        for (const Pool& pool : pools)
            fleet.add(pool);
        const Diagnosis diagnosis = std::move(fleet).diagnosis();
        REQUIRE(diagnosis.pools().size() == 1);
        return diagnosis.pools().front()->timeout()->ms;
    };
    const Pool worst = pool_with("a", PoolState::exposed, 5000, 0);
    const Pool other = pool_with("b", PoolState::safe, 7000, 0);
    CHECK(timer_of({worst, other}) == 5000);
    CHECK(timer_of({other, worst}) == 5000);
    CHECK(timer_of({worst, other, pool_with("c", PoolState::safe, 2000, 8)}) == 2000);
}

TEST_CASE("a host's pool that is exposed without a learned timer closes when its upstream does", "[fleet]")
{
    Fleet fleet;
    Pool tied = pool_of("a", PoolState::exposed, 100);
    tied.upstream.own_idle_limit =
        IdleTimeoutLearner({.ms = 60'000, .lowest_ms = 59'990, .highest_ms = 60'010, .samples = 8});
    Pool longer = tied;
    longer.hosts = {{"b", PoolState::exposed}};
    longer.requests = 10;
    longer.upstream.own_idle_limit =
        IdleTimeoutLearner({.ms = 75'000, .lowest_ms = 75'000, .highest_ms = 75'000, .samples = 8});
    fleet.add(tied);
    fleet.add(longer);
    const Diagnosis diagnosis = std::move(fleet).diagnosis();
    REQUIRE(diagnosis.pools().size() == 1);
    const Pool& pool = *diagnosis.pools().front();
    CHECK(pool.exposure.state == PoolState::exposed);
    REQUIRE(pool.timeout());
    CHECK(pool.timeout()->ms == 60'000);
    CHECK(pool.upstream.own_idle_limit.timeout()->ms == 75'000); // the upstream has to outwait all of them
    CHECK(report_text(diagnosis, Watched{}, Paint(false), 120).find("--timeout-keep-alive 80") != std::string::npos);

    Fleet unknown;
    unknown.add(pool_of("a", PoolState::exposed, 100));
    const Diagnosis nothing = std::move(unknown).diagnosis();
    CHECK(nothing.pools().front()->exposure.state == PoolState::unknown);
    CHECK(nothing.pools().front()->hosts.at("a") == PoolState::unknown);
}

TEST_CASE("a verdict's record, read back, tells the same story")
{
    for (event e : {crossing_closed(), refused(), in_exchange(EVENT_CLOSED, request_at + 30 * ms)}) {
        if (e.kind == EVENT_CLOSED && (e.connection.flags & CONNECTION_PEER_FIN) == 0) { // an RST, half way
            e.connection.flags |= CONNECTION_PEER_RESET | CONNECTION_RESET_HAS_ACK;
            e.connection.peer_reset_ns = request_at + 30 * ms;
            e.connection.reset_unacked = 100;
        }
        const Verdict verdict{.cause = Cause::keepalive_race,
                              .variant = Variant::fin_crossed,
                              .certainty = Certainty::likely,
                              .message = "They crossed.",
                              .reason = Reason::idle_timer};
        Outcome outcome;
        outcome.client = Client{.port = 5000, .answered = true, .status = 502, .certainty = Certainty::likely};
        const nlohmann::json row = stored(verdict_record(origin, e, verdict, Upstream{}, "", outcome));
        const FlatRecord record(row);
        const event again = event_of(record, e.timestamp_ns);
        const std::optional<Verdict> read = verdict_of(record);
        REQUIRE(read);
        CHECK(read->variant == verdict.variant);
        CHECK(read->certainty == verdict.certainty);
        CHECK(read->reason == verdict.reason);
        CHECK(read->message == verdict.message);
        const auto sighting = [&](const event& shown) {
            return Sighting{.judged = shown,
                            .last = shown,
                            .verdict = verdict,
                            .outcome = {},
                            .idle_timeout = {},
                            .process_name = "nginx"};
        };
        CHECK(story(sighting(again)) == story(sighting(e)));
        CHECK(whereabouts(sighting(again)) == whereabouts(sighting(e)));
        const Outcome client = outcome_of(record);
        REQUIRE(client.client);
        CHECK(client.client->answered);
        CHECK(client.client->port == 5000);
        CHECK(client.client->status == 0); // null in the store
    }
}

TEST_CASE("a row that is no verdict's is taken for none")
{
    for (const char* text :
         {"{}", R"({"finrace.cause":"sunspots"})", R"({"finrace.cause":7})", R"({"finrace.cause":null})"}) {
        const nlohmann::json row = nlohmann::json::parse(text);
        CHECK(!verdict_of(FlatRecord(row)));
    }
    CHECK(!upstream_key("", 80));
    CHECK(!upstream_key("10.0.0", 80));
    CHECK(upstream_key("fd00::1", 80)->family == 6);
}

TEST_CASE("a store's URL")
{
    CHECK(ClickHouse("http://logs").name() == "http://logs:8123");
    CHECK(ClickHouse("https://me:a%40b@logs/path/").name() == "https://logs:8443/path");
    CHECK(ClickHouse("http://[::1]:18123").name() == "http://[::1]:18123");
    CHECK(ClickHouse("http://[::1]").name() == "http://[::1]:8123");
    CHECK(ClickHouse("http://[2001:db8::a]/ch").name() == "http://[2001:db8::a]:8123/ch");
    for (const char* url : {"", "logs:8123", "http://", "http://me@", "http://logs:0", "http://logs:70000",
                            "http://logs:x", "http://logs/?query=1", "http://%4@logs", "http://%zz@logs"})
        CHECK_THROWS_WITH(ClickHouse(url), Catch::Contains("accepted: http[s]://"));
}
