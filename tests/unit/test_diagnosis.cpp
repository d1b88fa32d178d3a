// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Verdicts and pools into findings, and the report on them.
#include <ctime>
#include <string>

#include <catch2/catch.hpp>

#include "core/diagnosis.h"
#include "sink/report.h"
#include "teach.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint64_t minute_ns = 60'000 * ms;

void judge(Diagnosis& diagnosis, const event& e, Verdict verdict, const Outcome& outcome = {})
{
    const Classification classification{
        .ending = Ending::verdict, .verdict = std::move(verdict), .learned_idle_ms = std::nullopt};
    diagnosis.add({.e = e,
                   .last = e,
                   .classification = classification,
                   .outcome = outcome,
                   .upstream = known_upstream(),
                   .server_end = nullptr},
                  "nginx");
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

Watched watched(std::uint64_t lost = 0)
{
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    return {.host_name = "proxy1",
            .source = "backend trace by fentry",
            .observed_ns = minute_ns,
            .lost = lost,
            .tells_outcomes = true,
            .missing_hooks = 0,
            .clock = WallClock(1'769'860'800'000'000'000)};
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
    CHECK(findings[1]->count == 6);
    CHECK(findings[1]->hidden == 5);
    CHECK(findings[1]->harm() == 1);
    CHECK(findings[1]->answers == std::map<std::uint16_t, std::uint64_t>{{200, 5}, {502, 1}});
    CHECK(findings[2]->cause == Cause::upstream_reset);
    CHECK(diagnosis.state(false) == Diagnosis::State::findings);
    CHECK(diagnosis.state(true) == Diagnosis::State::findings);
}

TEST_CASE("a retry that failed as well hides nothing", "[diagnosis]")
{
    Diagnosis diagnosis;
    judge(diagnosis, crossing(), race(), answered(502, true));
    judge(diagnosis, crossing(), race(), answered(200)); // not known to have been tried again
    CHECK(diagnosis.findings().front()->hidden == 0);
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
    for (int i = 0; i < 3; ++i)
        teach(safe.own_idle_limit, 4000);
    safe.counts.exchanges = 10;
    SECTION("healthy")
    {
        diagnosis.add(upstreams, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::healthy);
        CHECK(says(text(diagnosis), "Healthy"));
        CHECK(diagnosis.state(true) == Diagnosis::State::inconclusive);
        CHECK(says(text(diagnosis, watched(3)), "3 events lost"));
    }
    SECTION("another pool of which too little was seen")
    {
        e.peer_port = 9000;
        upstreams.at(UpstreamKey::of(e)).counts.exchanges = 2;
        diagnosis.add(upstreams, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    }
    SECTION("an end without a name")
    {
        safe.counts.unclassified = 1;
        diagnosis.add(upstreams, minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::inconclusive);
    }
    SECTION("exposed")
    {
        diagnosis.note_process(UpstreamKey::of(e), "nginx");
        diagnosis.add(exposed_upstreams(e, 5), minute_ns);
        CHECK(diagnosis.state(false) == Diagnosis::State::exposed);
        CHECK(diagnosis.state(true) == Diagnosis::State::exposed);
        const std::string report = text(diagnosis);
        CHECK(says(report, "keepalive_timeout 4s;"));
        CHECK(says(report, "uvicorn --timeout-keep-alive 65"));
        CHECK(says(report, "rested for 5.00 s (5 samples, within 0 ms)"));
        const auto json = report_json(diagnosis, watched());
        CHECK(json["state"] == "exposed");
        CHECK(json["upstreams"][0]["exposure"]["late_reuses"] > 4);
        CHECK(json["upstreams"][0]["remedies"][1]["settings"][0] == "keepalive_timeout 4s;");
    }
}

TEST_CASE("of several runs a pool is the one that saw most of it", "[diagnosis]")
{
    Diagnosis diagnosis;
    diagnosis.add(exposed_upstreams(crossing(), 5), minute_ns);
    diagnosis.add(exposed_upstreams(crossing(), 3), minute_ns);
    REQUIRE(diagnosis.pools().size() == 1);
    CHECK(diagnosis.requests() == 50);
    diagnosis.add(exposed_upstreams(crossing(), 9), minute_ns);
    CHECK(diagnosis.requests() == 90);
}

TEST_CASE("the report on a race, word for word", "[diagnosis]")
{
    Diagnosis diagnosis;
    Verdict verdict = race();
    verdict.reason = Reason::idle_timer;
    judge(diagnosis, crossing(), verdict, answered(502));
    diagnosis.add(exposed_upstreams(crossing(), 5), minute_ns);
    CHECK(text(diagnosis) ==
          "finrace on proxy1: backend trace by fentry, 60.0 s, 1 upstream, 50 requests\n"
          "1 request died, of 1 cause.\n"
          "\n"
          "1. keepalive_race  10.0.0.2:8000  1 request died\n"
          "   request and idle close crossed: 1 proven. Why the upstream closed: 1 idle_timer.\n"
          "   Clients got: 1 × 502.\n"
          "   At 12:00:10.020:\n"
          "     12:00:10.020  keepalive_race (fin_crossed)  proven  idle_timer\n"
          "       nginx[1234]  10.0.0.1:41234 → 10.0.0.2:8000  request 3 on this connection\n"
          "             -981     ms   ·   idle      from here; this upstream closes after 5000 ms (5 closes, spread 0 "
          "ms)\n"
          "               +0.000 ms  ──▶  request   176 bytes\n"
          "              +20.113 ms  ◀──  FIN       acknowledges 0 of 176 request bytes: sent before the request "
          "arrived\n"
          "       They crossed.\n"
          "       The client 0.0.0.0:4000 got 502.\n"
          "   What to change\n"
          "     10.0.0.2:8000 closes connections that have rested for 5.00 s (5 samples, within 0 ms); nginx\n"
          "     has used them again after up to 4.00 s.\n"
          "     Raise the upstream's idle timeout (nginx keeps idle connections for 60 s, unless it is told\n"
          "     otherwise):\n"
          "       uvicorn --timeout-keep-alive 65\n"
          "       gunicorn --keep-alive 65\n"
          "       server.keepAliveTimeout = 65000\n"
          "     Or let the proxy close first (in its upstream block, beside keepalive):\n"
          "       keepalive_timeout 4s;\n"
          "\n"
          "Upstreams\n"
          "  10.0.0.2:8000  5 connections, 50 requests  exposed\n"
          "    10.0.0.2:8000 closes connections that have rested for 5.00 s (5 samples, within 0 ms); nginx has\n"
          "    used them again after up to 4.00 s.\n"
          "    Races to be expected: about 2.9 a day, if requests go on as they did (5 after more than half\n"
          "    that time); one is lost if it comes within 1.0 ms of the timer. Races seen: 0.\n");
}
