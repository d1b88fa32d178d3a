// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Verdicts and pools into findings, and the report on them.
#include <algorithm>
#include <ctime>
#include <string>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/diagnosis.h"
#include "sink/report.h"
#include "teach.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint64_t minute_ns = 60'000 * ms;
constexpr std::int64_t offset_ns = 1'769'860'800'000'000'000;

void judge(Diagnosis& diagnosis, const event& e, Verdict verdict, const Outcome& outcome = {},
           const std::string& process = "nginx")
{
    const Classification classification{
        .ending = Ending::verdict, .verdict = std::move(verdict), .learned_idle_ms = std::nullopt};
    diagnosis.add({.e = e,
                   .last = e,
                   .classification = classification,
                   .outcome = outcome,
                   .upstream = known_upstream(),
                   .server_end = nullptr},
                  process, offset_ns);
}

Outcome answered(std::uint16_t status, bool again = false)
{
    Outcome outcome = again ? retried() : Outcome{};
    outcome.client = Client{.port = 4000,
                            .family = 4,
                            .left = false,
                            .answered = status != 0,
                            .status = status,
                            .certainty = Certainty::likely};
    return outcome;
}

/// The upstream of crossing(), which closes after a second: by so many connections.
Upstreams exposed_upstreams(const event& e, int count)
{
    Upstreams upstreams;
    Upstream& upstream = upstreams.at(UpstreamKey::of(e));
    for (int i = 0; i < count; ++i) {
        teach(upstream.idle_timeout, 5000);
        ++upstream.counts.idle_closes_by_peer;
        ++upstream.counts.closed;
        upstream.counts.exchanges += 10;
        upstream.rests.add(4000);
        upstream.longest_reused_idle_ms = 4000;
    }
    return upstreams;
}

/// A connection to the upstream of `e` ends that this process has used twice.
void use_again(Diagnosis& diagnosis, event e, const std::string& process)
{
    e.kind = EVENT_CLOSED;
    diagnosis.follow(e, process);
}

Watched watched(std::uint64_t lost = 0)
{
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    return {.host_name = "proxy1",
            .source = "backend trace by fentry",
            .observed_ns = minute_ns,
            .lost = lost,
            .tells_outcomes = true,
            .missing_hooks = 0};
}

std::string text(const Diagnosis& diagnosis, const Watched& what = watched())
{
    return report_text(diagnosis, what, Paint(false), 100);
}

bool says(const std::string& report, const std::string& what)
{
    return report.find(what) != std::string::npos;
}

} // namespace

TEST_CASE("findings are by upstream and cause, the most harmful first", "[diagnosis]")
{
    Diagnosis diagnosis;
    event elsewhere = crossing();
    elsewhere.peer_port = 9000;
    for (int i = 0; i < 5; ++i)
        judge(diagnosis, crossing(), race(), answered(200, true)); // a retry hides them
    judge(diagnosis, crossing(), race(), answered(502));
    judge(diagnosis, elsewhere, race(), answered(502));
    judge(diagnosis, elsewhere, race(), answered(0));
    Verdict reset = race(Variant::none);
    reset.cause = Cause::upstream_reset;
    judge(diagnosis, elsewhere, reset);

    const auto findings = diagnosis.findings();
    REQUIRE(findings.size() == 3);
    CHECK(findings[0]->where == UpstreamKey::of(elsewhere));
    CHECK(findings[0]->cause == Cause::keepalive_race);
    CHECK(findings[0]->harm() == 2);
    CHECK(findings[0]->clients_left == 1);
    CHECK(findings[1]->where == UpstreamKey::of(crossing()));
    CHECK(findings[1]->affected == 6);
    CHECK(findings[1]->hidden == 5);
    CHECK(findings[1]->harm() == 1);
    CHECK(findings[1]->answers == std::map<std::uint16_t, std::uint64_t>{{200, 5}, {502, 1}});
    CHECK(findings[2]->cause == Cause::upstream_reset);
    CHECK(diagnosis.state(false) == Diagnosis::State::findings);
    CHECK(diagnosis.state(true) == Diagnosis::State::findings);
}

TEST_CASE("a refusal that cost no client's request comes after what did", "[diagnosis]")
{
    Verdict refused = race(Variant::none);
    refused.cause = Cause::connect_refused;
    event elsewhere = crossing();
    elsewhere.peer_port = 9000;
    const auto first = [&](const std::string& process, const Outcome& outcome) {
        Diagnosis diagnosis;
        judge(diagnosis, crossing(), race(), answered(502));
        for (int i = 0; i < 5; ++i)
            judge(diagnosis, elsewhere, refused, outcome, process);
        return diagnosis.findings().front()->cause;
    };
    CHECK(first("health-probe", {}) == Cause::keepalive_race);
    CHECK(first("health-probe", answered(502)) == Cause::connect_refused);
    CHECK(first("nginx", {}) == Cause::connect_refused);
}

TEST_CASE("a retry that failed as well hides nothing", "[diagnosis]")
{
    Diagnosis diagnosis;
    judge(diagnosis, crossing(), race(), answered(502, true));
    judge(diagnosis, crossing(), race(), answered(200)); // not known to have been tried again
    CHECK(diagnosis.findings().front()->hidden == 0);
    judge(diagnosis, crossing(), race(), answered(404, true)); // the application's own answer
    CHECK(diagnosis.findings().front()->hidden == 1);
}

TEST_CASE("the most telling instance is the most certain, of these the first", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict unsure = race();
    unsure.certainty = Certainty::possible;
    unsure.message = "Perhaps.";
    Verdict sure = race();
    sure.message = "The first.";
    judge(diagnosis, crossing(), unsure);
    judge(diagnosis, crossing(), sure);
    sure.message = "The second.";
    judge(diagnosis, crossing(), sure);
    CHECK(diagnosis.findings().front()->instance.verdict.message == "The first.");
    CHECK(diagnosis.findings().front()->certainties ==
          std::map<Certainty, std::uint64_t>{{Certainty::proven, 2}, {Certainty::possible, 1}});
    CHECK(says(text(diagnosis), "2 proven, 1 possible."));
    CHECK(says(text(diagnosis), "possible: another one fits nearly"));
}

TEST_CASE("of instances as certain the complete one tells most, then one whose client is known", "[diagnosis]")
{
    Diagnosis diagnosis;
    const auto judge_one = [&](const char* message, bool incomplete, const Outcome& outcome) {
        Verdict verdict = race();
        verdict.message = message;
        verdict.incomplete = incomplete;
        judge(diagnosis, crossing(), verdict, outcome);
        return diagnosis.findings().front()->instance.verdict.message;
    };
    CHECK(judge_one("Incomplete.", true, answered(502)) == "Incomplete.");
    CHECK(says(text(diagnosis), "1 proven (1 incomplete: older than"));
    CHECK(judge_one("Complete.", false, {}) == "Complete.");
    CHECK(judge_one("With its client.", false, answered(502)) == "With its client.");
    CHECK(judge_one("Another.", false, answered(502)) == "With its client.");
    CHECK(report_json(diagnosis, watched())["findings"][0]["incomplete"] == 1);
}

namespace {

/// A request that waited for so long before the upstream closed.
event closed_after(std::uint64_t wait_ms)
{
    static std::uint64_t begun_ns = 1000 * ms;
    event e = crossing();
    e.connection.request_ns = begun_ns += 5000 * ms;
    e.connection.peer_fin_ns = e.timestamp_ns = begun_ns + wait_ms * ms;
    return e;
}

Verdict closed()
{
    Verdict verdict = race(Variant::none);
    verdict.cause = Cause::upstream_closed;
    return verdict;
}

} // namespace

TEST_CASE("how long requests had waited: a spread, or a timer", "[diagnosis]")
{
    Diagnosis diagnosis;
    judge(diagnosis, closed_after(2), closed());
    CHECK(!says(text(diagnosis), "between"));
    judge(diagnosis, closed_after(31'200), closed());
    CHECK(says(text(diagnosis), "Between the requests and their ends lay 2 ms to 31.20 s."));
    for (const std::uint64_t wait_ms : {30'010U, 30'000U, 30'020U})
        judge(diagnosis, closed_after(wait_ms), closed());
    CHECK(says(text(diagnosis), "30.01 s lay between most requests and their ends (spread 20 ms): a limit of the "
                                "upstream's."));
    const auto json = report_json(diagnosis, watched())["findings"][0]["after_request"];
    CHECK(json["lowest_ms"] == 2);
    CHECK(json["highest_ms"] == 31'200);
    CHECK(json["timer"]["ms"] == 30'010);
    SECTION("no timer is as short as a handler's own close, and a race's moment is chance")
    {
        Diagnosis other;
        for (int i = 0; i < 5; ++i) {
            judge(other, closed_after(999), closed());
            judge(other, closed_after(5000), race());
        }
        CHECK(says(text(other), "Between the requests and their ends lay 999 ms."));
        CHECK(!says(text(other), "5 s lay"));
    }
}

TEST_CASE("a server that is known is told of, and its limit where that fits", "[diagnosis]")
{
    const auto report = [](const std::string& process, std::vector<Present> limit, std::uint64_t wait_ms) {
        Diagnosis diagnosis;
        for (int i = 0; i < 4; ++i)
            judge(diagnosis, closed_after(wait_ms), closed());
        diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns,
                          [&](const UpstreamKey& where, const Owner& owner) {
                              Ends ends = ends_by_name(where, owner);
                              ends.upstream.software = setting_of_server(process, {});
                              ends.upstream.worker_limit = limit;
                              return ends;
                          });
        const auto json = report_json(diagnosis, watched());
        CHECK(json["upstreams"][0].value("server", nlohmann::ordered_json::object()).contains("worker_limit") ==
              !limit.empty());
        return fmt::format("{}", fmt::join(json["findings"][0]["hints"].get<std::vector<std::string>>(), "\n"));
    };
    CHECK(!says(report("", {}, 3), "gunicorn"));
    CHECK(!says(report("node", {}, 3), "gunicorn"));
    CHECK(says(report("node", {}, 3), "Node.js stands there: an uncaught exception"));
    const std::vector<Present> told{{.ms = 3000, .text = "--timeout 3", .place = "command line of process 7"}};
    CHECK(says(report("gunicorn", told, 2624), "gunicorn's --timeout: now --timeout 3: command line of process 7."));
    const std::string fits = "process 7; these requests had taken about as long when they died. Raise it";
    CHECK(says(report("gunicorn", told, 3000), fits));
    CHECK(says(report("gunicorn", told, 5000), fits));
    CHECK(!says(report("gunicorn", told, 5001), fits));
    CHECK(says(report("gunicorn", told, 2625), "the longest of these requests had taken about as long when it died"));
    CHECK(!says(report("gunicorn", told, 2624), "about as long"));
    const std::vector<Present> none{{.ms = 0, .text = "--timeout 0", .place = "command line of process 7"}};
    CHECK(says(report("gunicorn", none, 500), "now --timeout 0: command line of process 7."));
    CHECK(!says(report("gunicorn", none, 500), "about as long"));
}

TEST_CASE("of several that died at one instant a process's end is told", "[diagnosis]")
{
    Diagnosis diagnosis;
    event e = closed_after(3);
    for (const unsigned later_ms : {0U, 50U, 50U, 101U}) {
        event one = e;
        one.timestamp_ns += later_ms * ms;
        judge(diagnosis, one, closed());
    }
    Upstreams upstreams;
    upstreams.at(UpstreamKey::of(e)).counts.closed = 4;
    diagnosis.end_run(upstreams, minute_ns, minute_ns);
    CHECK(says(text(diagnosis), "Up to 3 of them died within 100 ms of each other"));
    CHECK(diagnosis.findings().front()->most_at_once == 3);
}

TEST_CASE("what a server of this host's does is a finding at its own address", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race(Variant::none);
    verdict.cause = Cause::closed_on_request;
    judge(diagnosis, closed_unread(), verdict);
    REQUIRE(diagnosis.findings().size() == 1);
    CHECK(diagnosis.findings().front()->server_side);
    CHECK(diagnosis.findings().front()->where == UpstreamKey::local_of(closed_unread()));
    CHECK(report_json(diagnosis, watched())["findings"][0]["listener"]["port"] == closed_unread().local_port);
}

TEST_CASE("nothing failed: healthy, exposed, or not to be told", "[diagnosis]")
{
    Diagnosis diagnosis;
    CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive); // nothing seen at all
    CHECK(says(text(diagnosis), "no request was seen"));

    Upstreams upstreams;
    event e = crossing();
    Upstream& safe = upstreams.at(UpstreamKey::of(e));
    for (int i = 0; i < 5; ++i)
        teach(safe.own_idle_limit, 4000);
    safe.counts.exchanges = 10;
    SECTION("healthy")
    {
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::healthy);
        CHECK(says(text(diagnosis), "Healthy"));
        CHECK(diagnosis.state(true) == Diagnosis::State::inconclusive);
        CHECK(says(text(diagnosis, watched(3)), "3 events were not seen, or lost"));
    }
    SECTION("another pool of which too little was seen")
    {
        e.peer_port = 9000;
        upstreams.at(UpstreamKey::of(e)).counts.exchanges = 2;
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    }
    SECTION("an end without a name")
    {
        safe.counts.unclassified = 1;
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    }
    SECTION("exposed")
    {
        use_again(diagnosis, e, "nginx");
        diagnosis.end_run(exposed_upstreams(e, 5), minute_ns, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::exposed);
        CHECK(diagnosis.state(true) == Diagnosis::State::exposed);
        const std::string report = text(diagnosis);
        CHECK(says(report, "keepalive_timeout 4s;"));
        CHECK(says(report, "uvicorn --timeout-keep-alive 65"));
        CHECK(says(report, "a request will meet the idle close of 10.0.0.2:8000: what to change is"));
        CHECK(says(report, "rested for 5 s (5 samples, within 0 ms)"));
        const auto json = report_json(diagnosis, watched());
        CHECK(json["state"] == "exposed");
        CHECK(json["upstreams"][0]["exposure"]["late_reuses"] > 4);
        CHECK(json["upstreams"][0]["remedies"][1]["settings"][0]["setting"] == "keepalive_timeout 4s;");
    }
}

TEST_CASE("what is inconclusive says what was not seen, and what to do", "[diagnosis]")
{
    const auto headline = [](const Diagnosis& diagnosis, const Watched& what) {
        CHECK(diagnosis.state(what.is_partial()) == Diagnosis::State::inconclusive);
        return conclusion(diagnosis, what, Places(diagnosis));
    };
    Watched what = watched();
    Upstreams upstreams;
    Upstream& upstream = upstreams.at(UpstreamKey::of(crossing()));
    for (int i = 0; i < 5; ++i)
        teach(upstream.own_idle_limit, 4000);
    Diagnosis empty;
    Diagnosis diagnosis;
    SECTION("no request, live, of a recording and of a capture")
    {
        CHECK(headline(empty, what) ==
              "Inconclusive: no request was seen; watch for longer, or while there is traffic.");
        what.stored = true;
        CHECK(says(headline(empty, what), "; record for longer, or"));
        what.captures = {{.file = "a.pcap"}};
        CHECK(says(headline(empty, what), "; capture for longer, or"));
        what.adopted_open = 2;
        CHECK(headline(empty, what) ==
              "Inconclusive: no connection ended, which is when its requests are known; capture for longer.");
    }
    SECTION("something was lost")
    {
        what.lost = 1;
        CHECK(headline(empty, what) == "Inconclusive: nothing failed that was seen, but 1 event was lost; watch again, "
                                       "with more room (--ring-bytes 64M).");
        what.program_skipped = 1;
        CHECK(says(headline(empty, what), "1 event was lost; watch again: the kernel left out a run of one of"));
        what.lost = 3;
        what.table_full = 1;
        CHECK(says(headline(empty, what), "watch again, with more room (--ring-bytes 64M, --max-connections)."));
        what.lost = what.table_full = 1;
        what.program_skipped = 0;
        CHECK(says(headline(empty, what), "watch again, with more room (--max-connections)."));
        what.stored = true;
        what.lost = 2;
        CHECK(says(headline(empty, what), "2 events were lost; name all of the recording's files, or record again"));
    }
    SECTION("a part was not captured: each kind by its noun")
    {
        what.stored = true;
        what.lost = 1;
        what.captures = {{.file = "a.pcap", .one_direction = 1}};
        CHECK(headline(empty, what) == "Inconclusive: nothing failed that was seen, but not all was captured; capture "
                                       "both directions (tcpdump -i any).");
        CHECK(lost_text(what) == "Not all was captured: 1 connection in one direction alone. The counts below are too "
                                 "low.");
        what.captures.push_back({.file = "b.pcap", .unreadable = 2, .missing = 1, .one_direction = 3});
        what.lost = 8;
        CHECK(
            says(headline(empty, what), "(tcpdump -i any), with a larger buffer (-B 16384), more of each packet (-s"));
        CHECK(lost_text(what) ==
              "Not all was captured: 4 connections in one direction alone, 1 gap in what was acknowledged, 2 segments "
              "without a whole header, 1 more cut off, or without room. The counts below are too low.");
        what.captures = {{.file = "c.pcap"}};
        CHECK(says(headline(empty, what), "capture again, to the end"));
    }
    SECTION("a hook is missing")
    {
        upstream.counts.exchanges = 10;
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        what.missing_hooks = 1;
        CHECK(headline(diagnosis, what) == "Inconclusive: nothing failed that was seen, but 1 hook could not be "
                                           "attached; finrace doctor tells what goes unseen, and what to change.");
    }
    SECTION("an end without a name")
    {
        upstream.counts.exchanges = 10;
        upstream.counts.unclassified = 2;
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        CHECK(headline(diagnosis, what) == "Inconclusive: 2 connections ended in mid-exchange without a cause that can "
                                           "be named; finrace explain unclassified tells what that may be.");
    }
    SECTION("pools of which too little was seen")
    {
        upstream.counts.exchanges = 10;
        event e = crossing();
        for (std::uint16_t port = 9000; port < 9002; ++port) {
            e.peer_port = port;
            upstreams.at(UpstreamKey::of(e)).counts.exchanges = port;
        }
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        CHECK(headline(diagnosis, what) ==
              "Inconclusive: nothing failed, but whether connections to 10.0.0.2:9001 and 1 more upstream can race has "
              "not shown; watch for longer than they rest.");
    }
    SECTION("older connections")
    {
        upstream.counts.exchanges = 10;
        diagnosis.end_run(upstreams, minute_ns, minute_ns);
        what.adopted_open = 1;
        CHECK(headline(diagnosis, what) == "Inconclusive: nothing failed, but of 1 older connection nothing is known "
                                           "yet; watch for longer, or choose upstreams (--upstream).");
    }
    SECTION("one side alone")
    {
        what.server_side_only = true;
        CHECK(says(headline(empty, what), "leave out --side server"));
    }
}

TEST_CASE("a filter that nothing matched is said to be one, with what was seen instead", "[diagnosis]")
{
    Watched what = watched();
    what.filter = {"--upstream 10.0.0.9", "--process nginx"};
    what.chosen = true;
    Diagnosis diagnosis;
    CHECK(says(text(diagnosis, what), "Inconclusive: no connection matched --upstream 10.0.0.9 --process nginx, and no "
                                      "other was seen;"));
    what.adopted_open = 1;
    CHECK(says(text(diagnosis, what), "no connection that began or ended matched"));
    what.adopted_open = 0;
    for (std::uint16_t port = 8000; port < 8007; ++port) {
        event e = crossing();
        e.peer_port = port;
        what.elsewhere.push_back(
            {.where = UpstreamKey::of(e), .process = port == 8000 ? "app" : "", .connections = 8007U - port});
    }
    const std::string report = report_text(diagnosis, what, Paint(false), 400);
    CHECK(says(report, "no connection matched --upstream 10.0.0.9 --process nginx; choose among those that were seen, "
                       "or leave that out.\n"
                       "Seen: 10.0.0.2:8000 (app, 7 connections), 10.0.0.2:8001 (6 connections), 10.0.0.2:8002 (5 "
                       "connections), 10.0.0.2:8003 (4 connections), 10.0.0.2:8004 (3 connections), and 2 more "
                       "upstreams.\n"));
    const auto json = report_json(diagnosis, what);
    CHECK(json["filter"] == "--upstream 10.0.0.9 --process nginx");
    CHECK(json["elsewhere"].size() == 7);
    CHECK(json["elsewhere"][0]["process"] == "app");
    CHECK(json["elsewhere"][6]["connections"] == 1);

    diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns); // something matched
    CHECK(!says(text(diagnosis, what), "Seen: "));
    CHECK(!report_json(diagnosis, what).contains("elsewhere"));
    CHECK(!report_json(diagnosis, watched()).contains("filter"));
}

TEST_CASE("several runs add up, and a pool is what it was at its worst", "[diagnosis]")
{
    event e = crossing();
    Upstreams safe;
    Upstream& upstream = safe.at(UpstreamKey::of(e));
    for (int i = 0; i < 5; ++i)
        teach(upstream.own_idle_limit, 4000);
    upstream.counts.closed = 30;
    upstream.counts.exchanges = 1000;
    for (const bool bad_first : {true, false}) {
        Diagnosis diagnosis;
        if (bad_first)
            diagnosis.end_run(exposed_upstreams(e, 5), minute_ns, minute_ns);
        diagnosis.end_run(safe, minute_ns, minute_ns);
        if (!bad_first)
            diagnosis.end_run(exposed_upstreams(e, 5), minute_ns, minute_ns);
        REQUIRE(diagnosis.pools().size() == 1);
        CHECK(diagnosis.pools().front()->exposure.state == PoolState::exposed);
        CHECK(diagnosis.requests() == 1050);
        CHECK(diagnosis.connections() == 35);
        CHECK(diagnosis.state(false) == Diagnosis::State::exposed);
    }
    Diagnosis diagnosis;
    upstream.counts.unclassified = 1;
    diagnosis.end_run(safe, minute_ns, minute_ns);
    upstream.counts.unclassified = 0;
    upstream.counts.exchanges = 2000;
    diagnosis.end_run(safe, minute_ns, minute_ns);
    CHECK(diagnosis.unclassified() == 1);
    CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
}

TEST_CASE("connections that are open still may be another pool's", "[diagnosis]")
{
    event opened = crossing();
    opened.kind = EVENT_OPENED;
    opened.timestamp_ns = 1000 * ms;
    Upstreams upstreams;
    Upstream& upstream = upstreams.at(UpstreamKey::of(opened));
    for (int i = 0; i < 5; ++i)
        teach(upstream.own_idle_limit, 4000);
    upstream.counts.closed = upstream.counts.exchanges = 10;
    Diagnosis diagnosis;
    diagnosis.follow(opened, "");
    SECTION("for a moment")
    {
        diagnosis.end_run(upstreams, minute_ns, 2000 * ms);
        CHECK(diagnosis.state(false) == Diagnosis::State::healthy);
        CHECK(diagnosis.open() == 1);
    }
    SECTION("for a minute")
    {
        diagnosis.end_run(upstreams, minute_ns, 1000 * ms + minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    }
    SECTION("no more")
    {
        opened.kind = EVENT_CLOSED;
        diagnosis.follow(opened, "");
        diagnosis.end_run(upstreams, minute_ns, 1000 * ms + minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::healthy);
        CHECK(diagnosis.open() == 0);
    }
}

TEST_CASE("a pool is named after the process that uses most of it again", "[diagnosis]")
{
    Diagnosis diagnosis;
    for (const char* process : {"nginx", "nginx", "curl"})
        use_again(diagnosis, crossing(), process);
    event once = crossing();
    once.connection.exchange = 1;
    once.connection.flags &= ~CONNECTION_CARRIED;
    for (int i = 0; i < 5; ++i)
        use_again(diagnosis, once, "wget");
    diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns);
    CHECK(diagnosis.pools().front()->process == "nginx");
}

TEST_CASE("a proxy's own port, which clients on its host connect to, comes after its upstreams", "[diagnosis]")
{
    const auto pool_of = [](Upstreams& upstreams, const event& e, std::uint64_t requests) -> Upstream& {
        Upstream& upstream = upstreams.at(UpstreamKey::of(e));
        upstream.counts.opened = upstream.counts.closed = upstream.counts.exchanges = requests;
        return upstream;
    };
    event front = crossing();
    front.peer_port = 80;
    front.connection.exchange = 1;
    front.connection.flags &= ~CONNECTION_CARRIED;
    event unpooled = front;
    unpooled.peer_port = 8001;
    event shared = front;
    shared.peer_port = 8002;
    Upstreams upstreams;
    pool_of(upstreams, front, 100);
    pool_of(upstreams, unpooled, 20);
    pool_of(upstreams, shared, 10);
    pool_of(upstreams, crossing(), 10).rests.add(10);
    Diagnosis diagnosis;
    use_again(diagnosis, front, "curl");
    use_again(diagnosis, front, "curl");
    use_again(diagnosis, unpooled, "nginx");
    use_again(diagnosis, shared, "curl");
    use_again(diagnosis, shared, "wget");
    use_again(diagnosis, crossing(), "app");
    diagnosis.end_run(upstreams, minute_ns, minute_ns);
    std::vector<std::pair<std::uint16_t, std::string>> pools;
    for (const Pool* pool : diagnosis.pools())
        pools.emplace_back(pool->where.port, pool->process);
    CHECK(pools ==
          std::vector<std::pair<std::uint16_t, std::string>>{{8001, "nginx"}, {8000, "app"}, {80, "curl"}, {8002, ""}});
    CHECK(says(text(diagnosis), "10.0.0.2:80  100 requests on 100 connections, by curl  not_reused"));
}

TEST_CASE("who leaves is no failure", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict left = race(Variant::none);
    left.cause = Cause::client_abort;
    for (int i = 0; i < 100; ++i)
        judge(diagnosis, crossing(), left);
    CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    judge(diagnosis, crossing(), race());
    CHECK(diagnosis.findings().front()->cause == Cause::keepalive_race);
    CHECK(says(text(diagnosis), "100 clients left before the answer"));
}

TEST_CASE("advice is the reason's", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race();
    const auto report = [&] {
        diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns);
        return text(diagnosis);
    };
    const std::string settings = "uvicorn --timeout-keep-alive 65\n";
    const std::string general = "HAProxy has no idle limit towards servers";
    const std::string restart = "No idle timeout helps against a restart";
    SECTION("a limit of requests: no idle timeout cures that")
    {
        verdict.reason = Reason::request_limit;
        judge(diagnosis, crossing(), verdict);
        const std::string said = report();
        CHECK(says(said, "keepalive_requests"));
        CHECK(!says(said, general));
        CHECK(said.find(settings) > said.find("Before a request dies")); // of the pool, which is exposed all the same
    }
    SECTION("most of them for no reason that is known: perhaps a timer")
    {
        judge(diagnosis, crossing(), verdict);
        judge(diagnosis, crossing(), verdict);
        verdict.reason = Reason::restart;
        judge(diagnosis, crossing(), verdict);
        CHECK(diagnosis.findings().front()->is_of_timer());
        judge(diagnosis, crossing(), verdict);
        CHECK(!diagnosis.findings().front()->is_of_timer());
    }
    SECTION("its timer, and once a restart: both")
    {
        verdict.reason = Reason::idle_timer;
        judge(diagnosis, crossing(), verdict);
        verdict.reason = Reason::restart;
        judge(diagnosis, crossing(), verdict);
        const std::string said = report();
        CHECK(says(said, settings));
        CHECK(says(said, restart));
        CHECK(!says(said, general));
        CHECK(!says(said, "Before a request dies"));
    }
    SECTION("its timer")
    {
        verdict.reason = Reason::idle_timer;
        judge(diagnosis, crossing(), verdict);
        const std::string said = report();
        CHECK(says(said, settings));
        CHECK(!says(said, general));
        CHECK(!says(said, restart));
    }
    SECTION("its timer, which has not shown")
    {
        judge(diagnosis, crossing(), verdict);
        CHECK(says(text(diagnosis), general));
    }
}

TEST_CASE("a page has an end, and a name can't steer it", "[diagnosis]")
{
    Diagnosis diagnosis;
    event e = crossing();
    Verdict verdict = race();
    verdict.message = "by \xff\x1b[31m";
    for (unsigned i = 0; i < Diagnosis::most_findings + 10; ++i) {
        e.peer_port = static_cast<std::uint16_t>(1000 + i);
        judge(diagnosis, e, verdict);
    }
    CHECK(diagnosis.findings().size() == Diagnosis::most_findings);
    CHECK(diagnosis.more_failures() == 10);
    const std::string report = text(diagnosis);
    CHECK(std::count(report.begin(), report.end(), '\n') < 500);
    CHECK(says(report, "And 4076 findings more"));
    const auto json = report_json(diagnosis, watched());
    CHECK(json["findings"].size() == Diagnosis::most_findings);
    CHECK(json["findings"][0]["message"] == "by ??[31m");
}

TEST_CASE("a finding tells when: the first five times, and how many more", "[diagnosis]")
{
    Diagnosis diagnosis;
    event e = crossing();
    const auto wide = [&] { return report_text(diagnosis, watched(), Paint(false), 200); };
    const auto again = [&] {
        judge(diagnosis, e, race());
        e.timestamp_ns += 1000 * ms;
    };
    again();
    CHECK(says(wide(), "   At 12:00:10.020:\n"));
    again();
    CHECK(says(wide(), "   At 12:00:10.020, 12:00:11.020. The most telling one:\n"));
    for (int i = 0; i < 3; ++i)
        again();
    CHECK(says(wide(), "12:00:13.020, 12:00:14.020. The most telling one:\n"));
    again();
    CHECK(says(wide(), "12:00:14.020, and 1 more until 12:00:15.020. The most telling one:\n"));
}

TEST_CASE("no line of a report is wider than it may be", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race();
    verdict.reason = Reason::idle_timer;
    for (int i = 0; i < 7; ++i)
        judge(diagnosis, crossing(), verdict, answered(502));
    judge(diagnosis, refused(), verdict);
    use_again(diagnosis, crossing(), "nginx");
    diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns);
    for (const std::size_t width : {72U, 80U, 100U}) {
        const std::string report = report_text(diagnosis, watched(2), Paint(false), width);
        CAPTURE(report);
        std::size_t widest = 0;
        for (std::size_t at = 0; at < report.size();) {
            const std::size_t end = report.find('\n', at);
            widest = std::max(widest, columns(std::string_view(report).substr(at, end - at)));
            at = end + 1;
        }
        CHECK(widest <= width);
        CHECK(widest > width - 12);
        CHECK(columns(report_text(diagnosis, watched(2), Paint(true), width)) == columns(report));
    }
}

TEST_CASE("the report on a race, word for word", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race();
    verdict.reason = Reason::idle_timer;
    judge(diagnosis, crossing(), verdict, answered(502));
    use_again(diagnosis, crossing(), "nginx");
    diagnosis.end_run(exposed_upstreams(crossing(), 5), minute_ns, minute_ns);
    CHECK(text(diagnosis) ==
          "finrace on proxy1: backend trace by fentry, 60.0 s, 1 upstream, 50 requests on 5 connections\n"
          "1 finding: keepalive_race at 10.0.0.2:8000: 1 request died.\n"
          "\n"
          "1. keepalive_race  10.0.0.2:8000  1 request died\n"
          "   request and idle close crossed: 1 proven. Why the upstream closed: 1 idle_timer.\n"
          "   Clients got: 1 × 502.\n"
          "   At 12:00:10.020:\n"
          "     12:00:10.020  keepalive_race (fin_crossed)  proven  idle_timer\n"
          "       nginx[1234]  10.0.0.1:41234 → 10.0.0.2:8000  request 3 on this connection\n"
          "             -981     ms   ·   idle      from here; this upstream closes after 5000 ms (5 closes,\n"
          "                                         spread 0 ms)\n"
          "               +0.000 ms  ──▶  request   176 bytes\n"
          "              +20.113 ms  ◀──  FIN       acknowledges 0 of 176 request bytes: sent before the\n"
          "                                         request arrived\n"
          "       They crossed.\n"
          "       The client 0.0.0.0:4000 got 502.\n"
          "   What to change\n"
          "     10.0.0.2:8000 closes connections that have rested for 5 s (5 samples, within 0 ms); nginx has\n"
          "     used them again after up to 4 s.\n"
          "     Raise the upstream's idle timeout (nginx keeps idle connections for 60 s, unless it is told\n"
          "     otherwise):\n"
          "       uvicorn: uvicorn --timeout-keep-alive 65\n"
          "       gunicorn: gunicorn --keep-alive 65  (also where its workers are uvicorn's)\n"
          "       Node.js: server.keepAliveTimeout = 65000  (with server.headersTimeout above it)\n"
          "     Or let the proxy close first (a second before the upstream, which closes after 5 s):\n"
          "       nginx: keepalive_timeout 4s;  (in its upstream block, beside keepalive)\n"
          "\n"
          "Upstreams\n"
          "  10.0.0.2:8000  50 requests on 5 connections, by nginx  exposed\n"
          "    10.0.0.2:8000 closes connections that have rested for 5 s (5 samples, within 0 ms); nginx has\n"
          "    used them again after up to 4 s.\n"
          "    Races to be expected: 0.3 to 5.5 a day, 0.00042 to 0.0076 % of the requests, if these go on as\n"
          "    they did (5 after more than half that time). One is lost if it comes within 1.0 ms of the timer,\n"
          "    or before its process has seen the close. Races seen: 0.\n");
}

TEST_CASE("a file that is newer than its process is said to be", "[diagnosis]")
{
    PoolsNow now;
    now[UpstreamKey::of(crossing())] = {
        .resting = 1, .longest_rest_ms = 1, .open = 0, .requests = 0, .owner = {.process = "nginx", .pid = 7}};
    const EndsOf pending = [](const UpstreamKey& where, const Owner& owner) {
        Ends ends = ends_by_name(where, owner);
        ends.proxy.present = {{.ms = 1000, .text = "keepalive_timeout 1s;", .place = "n:4", .pending = true}};
        return ends;
    };
    Diagnosis diagnosis;
    diagnosis.end_run(Upstreams(), minute_ns, minute_ns, pending, &now);
    const std::string report = report_text(diagnosis, watched(), Paint(false), 200);
    CHECK(says(report, "nginx: n:4 (keepalive_timeout 1s;) was changed after the process had begun: reload it, unless "
                       "that was done since."));
    SECTION("and is why nothing can be concluded")
    {
        Upstreams used;
        used.at(UpstreamKey::of(crossing())).counts.exchanges = 3;
        diagnosis.end_run(used, minute_ns, minute_ns, pending, &now);
        CHECK(says(
            report_text(diagnosis, watched(), Paint(false), 200),
            "what nginx goes by is not known, for n:4 was changed after it had begun; reload it, and watch again"));
    }
}

TEST_CASE("requests on connections that are open still count where the kernel tells of them", "[diagnosis]")
{
    const UpstreamKey where = UpstreamKey::of(crossing());
    PoolsNow now;
    now[where] = {
        .resting = 1, .longest_rest_ms = 10, .open = 2, .requests = 2457, .owner = {.process = "nginx", .pid = 7}};
    const EndsOf told = [](const UpstreamKey& key, const Owner& owner) {
        Ends ends = ends_by_name(key, owner);
        ends.proxy.present = {{.ms = 60'000, .text = {}, .place = "n:4"}};
        ends.upstream = {.software = setting_of_server("uvicorn", {}),
                         .pid = 8,
                         .present = {{.ms = 75'000, .text = "--timeout-keep-alive 75", .place = "command line"}}};
        return ends;
    };
    Diagnosis diagnosis;
    diagnosis.end_run(Upstreams(), minute_ns, minute_ns, told, &now);
    CHECK(diagnosis.open_requests() == 2457);
    CHECK(diagnosis.state(false) == Diagnosis::State::healthy);
    const std::string report = report_text(diagnosis, watched(), Paint(false), 200);
    CHECK(says(report, "0 requests on 0 connections that ended, 2457 on those still open"));
    CHECK(says(report, "0 requests on 0 connections that ended, 2457 on 2 still open, by nginx"));
    CHECK(report_json(diagnosis, watched())["upstreams"][0]["in_use"]["requests"] == 2457);
    now[where].requests = now[where].open = 0;
    Diagnosis unused;
    unused.end_run(Upstreams(), minute_ns, minute_ns, told, &now);
    CHECK(unused.state(false) == Diagnosis::State::inconclusive);
}

TEST_CASE("what comes in bursts is said to, and how far these lie apart", "[diagnosis]")
{
    Diagnosis diagnosis;
    event e = crossing();
    const auto burst = [&](std::uint64_t after_ms) {
        e.timestamp_ns += after_ms * ms;
        judge(diagnosis, e, race());
        e.timestamp_ns += 1000 * ms; // not apart
        judge(diagnosis, e, race());
    };
    const auto wide = [&] { return report_text(diagnosis, watched(), Paint(false), 250); };
    burst(0);
    CHECK(diagnosis.findings().front()->bursts == 1);
    burst(8000);
    burst(1001);
    CHECK(diagnosis.findings().front()->bursts == 3);
    CHECK(says(wide(), ", in 3 bursts. The most"));
    burst(8000);
    burst(8000);
    CHECK(says(wide(), ", in 5 bursts, 9 s apart as a rule. The most"));
    CHECK(report_json(diagnosis, watched())["findings"][0]["bursts"] == 5);
}

TEST_CASE("what dies of two causes at one instant is one failure", "[diagnosis]")
{
    Diagnosis diagnosis;
    event e = crossing();
    const auto dies = [&](Cause cause, std::uint64_t after_ms) {
        e.timestamp_ns += after_ms * ms;
        Verdict verdict = race(Variant::none);
        verdict.cause = cause;
        judge(diagnosis, e, verdict);
    };
    const auto together = [&] {
        std::map<std::string, nlohmann::ordered_json> all;
        const auto report = report_json(diagnosis, watched());
        for (const auto& finding : report["findings"])
            if (finding.contains("together"))
                all[finding["cause"]] = finding["together"];
        return all;
    };
    dies(Cause::upstream_closed, 0);
    dies(Cause::upstream_closed, 1);
    dies(Cause::upstream_reset, 101);
    CHECK(together().empty());
    dies(Cause::keepalive_race, 0);
    dies(Cause::connect_refused, 0);
    CHECK(together().empty());
    dies(Cause::upstream_closed, 1000);
    dies(Cause::upstream_reset, 100);
    dies(Cause::upstream_closed, 1);
    CHECK(together()["upstream_closed"]["upstream_reset"] == 1);
    CHECK(together()["upstream_reset"]["upstream_closed"] == 1);
    CHECK(says(report_text(diagnosis, watched(), Paint(false), 400),
               "Once, a request to this upstream died within 100 ms of one of these as upstream_reset: such are one "
               "failure, not two."));
    dies(Cause::response_cut, 5000);
    dies(Cause::upstream_reset, 0);
    dies(Cause::upstream_closed, 0);
    CHECK(together().size() == 3);
    CHECK(together()["upstream_closed"]["upstream_reset"] == 2);
    CHECK(together()["upstream_closed"]["response_cut"] == 1);
    CHECK(
        says(report_text(diagnosis, watched(), Paint(false), 400),
             "2 times, requests to this upstream died within 100 ms of one of these as upstream_reset: such are one "));
}

TEST_CASE("what most races say of the upstream's close is told of its pool", "[diagnosis]")
{
    const auto state = [](int unannounced, int unknown) {
        Diagnosis diagnosis;
        event e = crossing();
        Upstreams upstreams;
        Upstream& upstream = upstreams.at(UpstreamKey::of(e));
        for (int i = 0; i < unannounced + unknown; ++i) {
            e.timestamp_ns += 1000 * ms;
            Verdict verdict = race();
            verdict.reason = i < unannounced ? Reason::unannounced : Reason::unknown;
            judge(diagnosis, e, verdict);
            ++upstream.counts.verdicts[Cause::keepalive_race];
            ++upstream.counts.closed;
            upstream.counts.exchanges += 2;
        }
        diagnosis.end_run(upstreams, minute_ns, e.timestamp_ns);
        return report_text(diagnosis, watched(), Paint(false), 400);
    };
    CHECK(says(state(2, 1), "closes first, as 3 races show, and by no idle timer that has shown: the upstream closes "
                            "right behind its answers, and does not say so in them."));
    CHECK(says(state(1, 1), "closes first, as 2 races show; after how long a rest has not shown."));
}

TEST_CASE("who refuses is looked up, and what it was told", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race(Variant::none);
    verdict.cause = Cause::connect_refused;
    judge(diagnosis, refused(), verdict);
    Upstreams upstreams;
    upstreams.at(UpstreamKey::of(refused())).counts.open_failed = 1;
    const auto hints = [&](std::optional<bool> listens, const std::string& recycling) {
        Diagnosis one = diagnosis;
        one.end_run(upstreams, minute_ns, minute_ns, [&](const UpstreamKey&, const Owner&) {
            Ends ends;
            ends.upstream.software = setting_of_server("uvicorn", {});
            ends.upstream.listens = listens;
            ends.upstream.recycling = recycling;
            return ends;
        });
        return report_json(one, watched())["findings"][0]["hints"].dump();
    };
    Watched overflowing = watched();
    overflowing.turned_away = 114;
    verdict.cause = Cause::connect_timeout;
    Diagnosis unanswered;
    judge(unanswered, refused(), verdict);
    for (const bool here : {true, false}) {
        unanswered.end_run(upstreams, minute_ns, minute_ns, [&](const UpstreamKey&, const Owner&) {
            Ends ends;
            ends.upstream.software = setting_of_server("node", {});
            ends.upstream.listens = here;
            return ends;
        });
        CHECK(says(report_json(unanswered, overflowing)["findings"][0]["hints"].dump(),
                   "Node.js listens on this host, and meanwhile 114 connections here were turned away") == here);
        CHECK(!says(report_json(unanswered, watched())["findings"][0]["hints"].dump(), "turned away because"));
    }
    CHECK(!says(hints(std::nullopt, ""), "there now"));
    CHECK(says(hints(true, ""), "uvicorn listens there now"));
    CHECK(says(hints(false, ""), "Nobody on this host listens there now"));
    CHECK(says(hints(true, "--limit-max-requests 400: command line of process 7"),
               "requests, --limit-max-requests 400: command"));
}

TEST_CASE("what is to be changed is told once", "[diagnosis]")
{
    Diagnosis diagnosis;
    event elsewhere = crossing();
    elsewhere.peer_port = 9000;
    judge(diagnosis, crossing(), closed());
    judge(diagnosis, elsewhere, closed());
    const std::string report = text(diagnosis);
    CHECK(says(report, "   What to change: as for 1.\n"));
    CHECK(report.find("This is not the keep-alive race") == report.rfind("This is not the keep-alive race"));
}

TEST_CASE("what makes a pool safe is quoted, and a proxy that is taken for an upstream is said to be one",
          "[diagnosis]")
{
    PoolsNow now;
    now[UpstreamKey::of(crossing())] = {
        .resting = 1, .longest_rest_ms = 1, .open = 0, .requests = 0, .owner = {.process = "haproxy", .pid = 7}};
    const auto report = [&](const std::string& server) {
        Diagnosis diagnosis;
        diagnosis.end_run(
            exposed_upstreams(crossing(), 0), minute_ns, minute_ns,
            [&](const UpstreamKey& key, const Owner& owner) {
                Ends ends = ends_by_name(key, owner);
                ends.proxy.present = {{.ms = 60'000, .text = "keepalive_timeout 60s;", .place = "/etc/a.conf:9"}};
                ends.upstream = {.software = setting_of_server(server, {}),
                                 .pid = 8,
                                 .present = {{.ms = 75'000, .text = "keep = 75", .place = "/etc/b.conf:3"}}};
                return ends;
            },
            &now);
        REQUIRE(diagnosis.pools().size() == 1);
        return text(diagnosis);
    };
    CHECK(says(report("nginx"), "nginx: now keep = 75: /etc/b.conf:3."));
    CHECK(says(report("nginx"), "HAProxy: now keepalive_timeout 60s: /etc/a.conf:9."));
    CHECK(says(report("nginx"), "nginx itself listens there."));
    CHECK(!says(report("uvicorn"), "itself listens there"));
}

TEST_CASE("several runs are said to be", "[diagnosis]")
{
    Diagnosis diagnosis;
    diagnosis.end_run(Upstreams(), minute_ns, minute_ns);
    CHECK(!says(text(diagnosis), "runs"));
    CHECK(report_json(diagnosis, watched())["runs"] == 1);
    diagnosis.end_run(Upstreams(), minute_ns, minute_ns);
    CHECK(says(text(diagnosis), "2 runs, together 60.0 s"));
    CHECK(report_json(diagnosis, watched())["runs"] == 2);
}

TEST_CASE("the pools that are there now, and who stands at their ends", "[diagnosis]")
{
    const UpstreamKey where = UpstreamKey::of(crossing());
    PoolsNow now;
    now[where] = {
        .resting = 3, .longest_rest_ms = 1234, .open = 0, .requests = 0, .owner = {.process = "nginx", .pid = 7}};
    Diagnosis diagnosis;
    Owner asked;
    diagnosis.end_run(
        Upstreams(), minute_ns, minute_ns,
        [&](const UpstreamKey& key, const Owner& owner) {
            CHECK(key == where);
            asked = owner;
            Ends ends = ends_by_name(key, owner);
            ends.proxy.present = {{.ms = 60'000, .text = {}, .place = "upstream app, /etc/nginx/nginx.conf:9"}};
            ends.upstream = {.software = setting_of_server("uvicorn", {}),
                             .pid = 8,
                             .present = {{.ms = 5000, .text = "--timeout-keep-alive 5", .place = "command line"}}};
            return ends;
        },
        &now);
    CHECK(asked.process == "nginx");
    CHECK(asked.pid == 7);
    REQUIRE(diagnosis.pools().size() == 1);
    CHECK(diagnosis.state(false) == Diagnosis::State::exposed); // before any request was seen
    const std::string report = text(diagnosis);
    CHECK(says(report, "3 connections rest now, for up to 1.23 s"));
    CHECK(says(report, "rested for 5 s, as uvicorn is told"));
    CHECK(says(report, "How often a request will meet that is known when"));
    CHECK(says(report, "uvicorn --timeout-keep-alive 65"));
    CHECK(!says(report, "gunicorn"));
    CHECK(says(report, "now --timeout-keep-alive 5: command line"));
    CHECK(says(report, "now its default, 60 s: upstream app, /etc/nginx/nginx.conf:9"));
    const auto json = report_json(diagnosis, watched());
    CHECK(json["upstreams"][0]["resting"]["connections"] == 3);
    CHECK(json["upstreams"][0]["proxy"]["software"] == "nginx");
    CHECK(json["upstreams"][0]["server"]["present"][0]["ms"] == 5000);
    CHECK(json["upstreams"][0]["remedies"][1]["settings"][0]["present"][0]["place"] ==
          "upstream app, /etc/nginx/nginx.conf:9");
}
