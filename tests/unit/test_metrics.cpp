// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The metrics' text: what it says of a run, and that no number of upstreams makes it grow without end.
#include <algorithm>
#include <array>
#include <chrono>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "cli/metrics_server.h"
#include "core/docket.h"
#include "sink/facts.h"
#include "sink/metrics.h"
#include "teach.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

Health standing_health()
{
    Health health;
    health.version = "1.2.3";
    health.backend = "trace";
    health.attach = "fentry";
    health.uptime = std::chrono::hours(1);
    health.outputs = {{.name = "-", .written = 5}, {.name = "journald", .dropped = 3, .problem = 111}};
    health.beside = {{.name = "record:f", .written = 11, .dropped = 2}};
    health.losses.by_place[LOSS_RING_FULL] = 7;
    health.missing_hooks = {{.name = "fentry/x", .purpose = "", .problem = ""}};
    return health;
}

std::string text_of(Metrics& metrics, const Health& health, const Upstreams& upstreams)
{
    return metrics.text({.health = health,
                         .upstreams = upstreams,
                         .programs = {{.name = "trace_send", .runs = 4, .time = std::chrono::milliseconds(1500)}},
                         .process = {.processor = std::chrono::milliseconds(250), .resident_bytes = 1U << 20U}});
}

/// The value of the one series whose line begins so; -1 if there is none, -2 if there are several.
double value_of(const std::string& text, const std::string& series)
{
    std::istringstream lines(text);
    std::vector<std::string> found;
    for (std::string line; std::getline(lines, line);)
        if (line.starts_with(series) && (line[series.size()] == ' '))
            found.push_back(line.substr(series.size() + 1));
    if (found.empty())
        return -1;
    return found.size() > 1 ? -2 : std::stod(found.front());
}

std::size_t lines_of(const std::string& text)
{
    return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

UpstreamLabel label_of(const UpstreamKey& key)
{
    return {.address = address_text(key.address.data(), key.family)};
}

UpstreamKey key_of(unsigned number)
{
    return {.address = {10, 0, static_cast<std::uint8_t>(number >> 8U), static_cast<std::uint8_t>(number)}, .port = 80};
}

/// A race with that upstream, at that time.
void count_race(Metrics& metrics, unsigned number, std::uint64_t at_ns, const Outcome& outcome = {},
                Certainty certainty = race().certainty)
{
    event e = crossing();
    const UpstreamKey key = key_of(number);
    std::copy(key.address.begin(), key.address.end(), e.peer_address);
    e.peer_port = key.port;
    e.family = 4;
    e.timestamp_ns = at_ns;
    Verdict verdict = race();
    verdict.certainty = certainty;
    const Classification classification{.ending = Ending::verdict, .verdict = verdict, .learned_idle_ms = {}};
    const Upstream upstream;
    metrics.count({.e = e,
                   .last = e,
                   .classification = classification,
                   .outcome = outcome,
                   .upstream = upstream,
                   .server_end = nullptr});
}

} // namespace

TEST_CASE("a run's metrics are there from its start")
{
    Metrics metrics(label_of);
    const Upstreams none;
    const std::string text = text_of(metrics, standing_health(), none);
    CHECK(value_of(text, R"(finrace_build_info{version="1.2.3"})") == 1);
    CHECK(value_of(text, R"(finrace_backend_info{backend="trace",attach="fentry"})") == 1);
    CHECK(value_of(text, "finrace_races_total") == 0);
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="other"})") == 0);
    CHECK(value_of(text, R"(finrace_lost_total{place="ring_full"})") == 7);
    CHECK(value_of(text, R"(finrace_lost_total{place="table_full"})") == 0);
    CHECK(value_of(text, R"(finrace_output_records_written_total{output="-"})") == 5);
    CHECK(value_of(text, R"(finrace_output_records_dropped_total{output="journald"})") == 3);
    CHECK(value_of(text, R"(finrace_output_records_dropped_total{output="record:f"})") == 2);
    CHECK(value_of(text, R"(finrace_output_failing{output="-"})") == 0);
    CHECK(value_of(text, R"(finrace_output_failing{output="journald"})") == 1);
    CHECK(value_of(text, "finrace_missing_hooks") == 1);
    CHECK(value_of(text, R"(finrace_bpf_run_seconds_total{program="trace_send"})") == 1.5);
    CHECK(value_of(text, "process_cpu_seconds_total") == 0.25);
}

TEST_CASE("an upstream's metrics: its counts, its timer, and the rests of its connections")
{
    Upstreams upstreams;
    Upstream& upstream = upstreams.at(key_of(1), 1);
    upstream.counts.opened = 9;
    upstream.counts.exchanges = 30;
    upstream.counts.idle_closes_by_peer = 6;
    upstream.longest_reused_idle_ms = 4500;
    for (unsigned i = 0; i < 6; ++i)
        upstream.idle_timeout.learn(5000 + i, i * 10'000'000'000ULL);
    for (const std::uint32_t rest_ms : {50U, 700U, 1'900U, 4'500U})
        upstream.rests.add(rest_ms);
    Health health = standing_health();
    health.verdicts[Cause::keepalive_race] = 2;
    health.verdicts[Cause::stale_reuse] = 1;
    health.verdicts[Cause::connect_refused] = 5;
    Metrics metrics(label_of);
    Outcome retried;
    retried.retry = Retry{};
    retried.client = Client{};
    retried.client->answered = true;
    retried.client->status = 502;
    count_race(metrics, 1, 5, retried);
    count_race(metrics, 1, 6);
    const std::string text = text_of(metrics, health, upstreams);
    const std::string labels = R"({upstream="10.0.0.1:80")";
    CHECK(value_of(text, "finrace_races_total") == 3);
    CHECK(value_of(text, "finrace_upstream_races_total" + labels + "}") == 2);
    CHECK(value_of(text, "finrace_upstream_connections_opened_total" + labels + "}") == 9);
    CHECK(value_of(text, "finrace_upstream_exchanges_total" + labels + "}") == 30);
    CHECK(value_of(text, "finrace_upstream_connections_reused_total" + labels + "}") == 4);
    CHECK(value_of(text, "finrace_upstream_idle_closes_total" + labels + R"(,by="peer"})") == 6);
    CHECK(value_of(text, "finrace_upstream_idle_timeout_seconds" + labels + "}") == Approx(5).epsilon(0.01));
    CHECK(value_of(text, "finrace_upstream_idle_timeout_samples" + labels + "}") == 6);
    CHECK(value_of(text, "finrace_upstream_longest_reused_idle_seconds" + labels + "}") == 4.5);
    CHECK(value_of(text, "finrace_upstream_exposed" + labels + "}") == 1);
    const auto below = [&](const std::string& bound) {
        return value_of(text, "finrace_upstream_longest_idle_seconds_bucket" + labels + ",le=\"" + bound + "\"}");
    };
    CHECK(below("0.1") == 1);
    CHECK(below("1") == 2);
    CHECK(below("2") <= 3);
    CHECK(below("3") == 3);
    CHECK(below("7.5") == 4);
    CHECK(below("+Inf") == 4);
    CHECK(value_of(text, "finrace_upstream_longest_idle_seconds_sum" + labels + "}") == Approx(7.15).epsilon(0.1));
    const std::string verdict = "finrace_verdicts_total" + labels +
                                R"(,cause="keepalive_race",variant="fin_crossed",certainty="proven",side="client",)";
    CHECK(value_of(text, verdict + R"(retried="yes",client_status="502"})") == 1);
    CHECK(value_of(text, verdict + R"(retried="unknown",client_status="unknown"})") == 1);
}

TEST_CASE("an exposed upstream's metrics: the races to be expected, between bounds, and this host's own limit")
{
    Upstreams upstreams;
    Upstream& upstream = upstreams.at(key_of(1), 1);
    for (unsigned i = 0; i < 5; ++i)
        teach(upstream.idle_timeout, 5000);
    for (unsigned i = 0; i < 3; ++i)
        teach(upstream.own_idle_limit, 7500);
    for (unsigned i = 0; i < 16; ++i)
        upstream.rests.add(4000);
    upstream.rtt_us = 24'000;
    upstreams.at(key_of(2), 1).counts.opened = 1;
    Metrics metrics(label_of);
    const std::string text = text_of(metrics, standing_health(), upstreams);
    const std::string labels = R"({upstream="10.0.0.1:80")";
    CHECK(value_of(text, "finrace_upstream_exposed" + labels + "}") == 1);
    CHECK(value_of(text, "finrace_upstream_own_idle_limit_seconds" + labels + "}") == 7.5);
    // Of 2.5 s before the timer 25 ms lose a request: of 16 in an hour 3.84 a day. Two standard errors are half of it.
    const std::string expected = "finrace_upstream_expected_races_per_day" + labels;
    CHECK(value_of(text, expected + R"(,bound="low"})") == Approx(1.92));
    CHECK(value_of(text, expected + R"(,bound="high"})") == Approx(5.76));

    // What is not known is not there, rather than 0.
    const std::string other = R"({upstream="10.0.0.2:80")";
    CHECK(value_of(text, "finrace_upstream_exposed" + other + "}") == 0);
    for (const char* name : {"finrace_upstream_idle_timeout_seconds", "finrace_upstream_own_idle_limit_seconds",
                             "finrace_upstream_expected_races_per_day"}) {
        CAPTURE(name);
        CHECK(text.find(name + labels) != std::string::npos);
        CHECK(text.find(name + other) == std::string::npos);
    }
}

TEST_CASE("an exposed upstream without series of its own is told of all the same")
{
    Upstreams upstreams;
    upstreams.at(key_of(1), 1).counts.opened = 1;
    Metrics metrics(label_of, 1);
    std::string text = text_of(metrics, standing_health(), upstreams);
    CHECK(text.find(R"(finrace_upstream_exposed{upstream="other"})") == std::string::npos);
    for (const unsigned number : {2U, 3U}) {
        Upstream& upstream = upstreams.at(key_of(number), 1);
        for (unsigned i = 0; i < 5; ++i)
            teach(upstream.idle_timeout, 5000);
        for (unsigned i = 0; i < 3; ++i)
            teach(upstream.own_idle_limit, 7500);
        for (unsigned i = 0; i < 16; ++i)
            upstream.rests.add(4000);
        upstream.rtt_us = 24'000;
    }
    text = text_of(metrics, standing_health(), upstreams);
    CHECK(value_of(text, R"(finrace_upstream_exposed{upstream="other"})") == 1);
    CHECK(value_of(text, R"(finrace_upstream_expected_races_per_day{upstream="other",bound="low"})") ==
          Approx(2 * 1.92));
}

TEST_CASE("upstreams beyond the limit share one, and the text stays as long as it is")
{
    Metrics metrics(label_of, 3);
    Upstreams upstreams;
    for (unsigned number = 0; number < 3; ++number) {
        upstreams.at(key_of(number), 1);
        count_race(metrics, number, 1);
    }
    const std::size_t lines = lines_of(text_of(metrics, standing_health(), upstreams));
    for (unsigned number = 3; number < 500; ++number) {
        upstreams.at(key_of(number), 2);
        count_race(metrics, number, 2);
    }
    std::string text = text_of(metrics, standing_health(), upstreams);
    CHECK(lines_of(text) == lines + 1); // the verdicts of "other"
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="other"})") == 497);

    // One that has been silent for an hour makes room.
    const std::uint64_t later = Upstreams::forgotten_after_ns + 10;
    count_race(metrics, 900, later);
    text = text_of(metrics, standing_health(), Upstreams());
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="10.0.3.132:80"})") == 1);
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="10.0.0.0:80"})") == -1);
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="other"})") == 497);
    // The others keep what they have counted, also when all are asked for.
    text = text_of(metrics, standing_health(), upstreams);
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="10.0.0.1:80"})") == 1);
    CHECK(value_of(text, R"(finrace_upstream_races_total{upstream="10.0.0.2:80"})") == 1);
}

TEST_CASE("what a server answers can't make a series each")
{
    Metrics metrics(label_of);
    for (unsigned status = 0; status < 1000; ++status) {
        Outcome outcome;
        outcome.client = Client{};
        outcome.client->answered = true;
        outcome.client->status = static_cast<std::uint16_t>(status);
        count_race(metrics, 1, status, outcome);
    }
    const std::string text = text_of(metrics, standing_health(), Upstreams());
    std::size_t series = 0;
    for (std::size_t at = text.find("\nfinrace_verdicts_total{"); at != std::string::npos;
         at = text.find("\nfinrace_verdicts_total{", at + 1))
        ++series;
    CHECK(series == 15); // nine by number, five classes, and unknown
}

TEST_CASE("outcomes of one upstream are told apart up to a number of them")
{
    Metrics metrics(label_of);
    constexpr std::array statuses{400, 408, 413, 429, 499, 500, 502, 503, 504, 200, 301, 418, 599};
    constexpr std::array certainties{Certainty::proven, Certainty::likely, Certainty::possible};
    std::uint64_t counted = 0;
    for (const int status : statuses)
        for (const Certainty certainty : certainties)
            for (const bool known : {false, true}) {
                Outcome outcome;
                outcome.known = known;
                outcome.client = Client{};
                outcome.client->answered = true;
                outcome.client->status = static_cast<std::uint16_t>(status);
                count_race(metrics, 1, ++counted, outcome, certainty);
            }
    const std::string text = text_of(metrics, standing_health(), Upstreams());
    std::istringstream lines(text);
    std::uint64_t told = 0;
    std::size_t series = 0;
    std::size_t others = 0;
    for (std::string line; std::getline(lines, line);) {
        if (!line.starts_with("finrace_verdicts_total{"))
            continue;
        ++series;
        others += line.find("retried=\"other\",client_status=\"other\"") != std::string::npos ? 1 : 0;
        told += std::stoull(line.substr(line.rfind(' ')));
    }
    CHECK(series <= 40 + certainties.size());
    CHECK(others == certainties.size());
    CHECK(told == counted);
}

TEST_CASE("where metrics are served")
{
    const AddressPattern local = parse_metrics_address("9735");
    CHECK(local.address[0] == 127);
    CHECK(local.address[3] == 1);
    CHECK(local.port == 9735);
    CHECK(parse_metrics_address("[::1]:80").family == 6);
    CHECK(parse_metrics_address("0.0.0.0:80").port == 80);
    for (const std::string text : {"", "0", "65536", "host:80", "10.0.0.1", ":80", "10.0.0.0/8:80", "::1", "[::1]"})
        CHECK_THROWS_AS(parse_metrics_address(text), UsageError);
}
