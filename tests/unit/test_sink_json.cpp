// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Records against golden texts and against docs/record.schema.json, by Debian's python3-jsonschema.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include <unistd.h>

#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "sink/facts.h"
#include "sink/history.h"
#include "sink/json.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

/// 2026-01-31T12:00:00Z at monotonic zero.
const Origin origin{.host_name = "proxy-1", .clock = WallClock(1'769'860'800'000'000'000)};

Health healthy()
{
    Health health;
    health.version = "0.1.0";
    health.backend = "trace";
    health.attach = "fentry";
    health.interval = std::chrono::seconds(10);
    health.uptime = std::chrono::milliseconds(12'345);
    health.connections_begun = 10;
    health.connections_adopted = 2;
    health.connections_ended = 7;
    health.events = 40;
    health.outputs = {{.name = "-", .written = 5}};
    health.upstreams = 1;
    health.verdicts = {{Cause::keepalive_race, 3}};
    return health;
}

Json verdict_of(const event& e, const Verdict& verdict = race())
{
    return verdict_record(origin, e, verdict, Upstream{}, "");
}

/// Runs tests/check_records.py over these lines; its exit status.
int check_records(const std::vector<std::string>& lines)
{
    const auto script = std::filesystem::path(__FILE__).parent_path().parent_path() / "check_records.py";
    std::string path = std::filesystem::temp_directory_path() / "finrace-records-XXXXXX";
    const int fd = ::mkstemp(path.data());
    REQUIRE(fd >= 0);
    ::close(fd);
    {
        std::ofstream file(path);
        for (const std::string& line : lines)
            file << line << '\n';
    }
    const int status = std::system(("/usr/bin/python3 " + script.string() + " " + path + " >&2").c_str());
    std::filesystem::remove(path);
    REQUIRE(WIFEXITED(status));
    return WEXITSTATUS(status);
}

} // namespace

TEST_CASE("a crossing's record, word for word")
{
    const Json record = verdict_record(origin, crossing(), race(), known_upstream(), "not asked for");
    CHECK(to_line(record) ==
          R"({"timestamp":"2026-01-31T12:00:10.020113000Z","event":{"name":"finrace.verdict"},)"
          R"("host":{"name":"proxy-1"},"process":{"pid":1234,"executable":{"name":"nginx"}},)"
          R"("network":{"transport":"tcp","type":"ipv4","local":{"address":"10.0.0.1","port":41234},)"
          R"("peer":{"address":"10.0.0.2","port":8000}},)"
          R"("finrace":{"schema":1,"cause":"keepalive_race","variant":"fin_crossed","certainty":"proven",)"
          R"("side":"client","message":"They crossed.",)"
          R"("connection":{"id":"abcdef0123456789","age_ms":5020.113,"netns":4026531840,"exchange":3,"reused":true,)"
          R"("idle_ms":981},"request":{"bytes":176,"sequence_number":7000,"unacked_bytes":176},"response":{"bytes":0},)"
          R"("close":{"by":"peer","how":"fin","after_request_ms":20.113},)"
          R"("upstream":{"idle_timeout_ms":1000,"spread_ms":5,"samples":4},)"
          R"("evidence":{"event":"peer_fin","state":"CLOSE_WAIT","peer_fin_ms":20.113,"fin_unacked_bytes":176,)"
          R"("quiet_before_close_ms":20,"srtt_us":40210,"retransmits":0,"unread_bytes":0},)"
          R"("lost_events":0,"incomplete":false}})");
}

TEST_CASE("a record's time is what the calendar says, to the nanosecond")
{
    const WallClock clock(0);
    CHECK(clock.rfc3339(0) == "1970-01-01T00:00:00.000000000Z");
    CHECK(clock.rfc3339(1'709'210'096'000'000'007) == "2024-02-29T12:34:56.000000007Z");
    constexpr std::uint64_t step_ns = 8'765'432'109'876'543; // a hundred days and a few hours
    for (std::uint64_t ns = 999'999'999; ns < 8'000'000'000'000'000'000; ns += step_ns) {
        const auto seconds = static_cast<std::time_t>(ns / 1'000'000'000);
        std::tm utc{};
        REQUIRE(::gmtime_r(&seconds, &utc) != nullptr);
        std::array<char, 32> day{};
        REQUIRE(std::strftime(day.data(), day.size(), "%Y-%m-%dT%H:%M:%S", &utc) > 0);
        if (const std::string due = fmt::format("{}.{:09}Z", day.data(), ns % 1'000'000'000); clock.rfc3339(ns) != due)
            FAIL(due);
    }
}

TEST_CASE("a record's line has no control characters, and reads back as it was")
{
    const std::string text = "\x01\x1b[2J\n\x7f\x7f\xc2\x80\xc2\x9b\xc2\xa0\xc3\xa9\xe2\x82\xac\xc2\x9f";
    const std::string line = to_line(Json{{"name", text}});
    CHECK(line == "{\"name\":\"\\u0001\\u001b[2J\\n\\u007f\\u007f\\u0080\\u009b\xc2\xa0\xc3\xa9\xe2\x82\xac\\u009f\"}");
    CHECK(Json::parse(line).at("name") == text);
}

TEST_CASE("a record's line is what the library writes, of every kind of value")
{
    const Json record = {
        {"empty", Json::object()},
        {"none", Json::array()},
        {"numbers", {0, -7, 18446744073709551615U, 0.0, -0.5, 1e300, 20.113}},
        {"words", {true, false, nullptr}},
        {"nested", {{"list", {{{"a", 1}}, Json::array({Json::array()}), Json::object()}}, {"last", ","}}},
        {"texts", {"", " ~", "\"", "\\", "\n", "\xc3\xa9", "\xff"}},
        {"a key with \"quotes\"", "x"}};
    CHECK(to_line(record) == record.dump(-1, ' ', false, Json::error_handler_t::replace));
    for (const double value :
         {0.001, 0.0005, 0.0014, 0.01, 0.1, 1.0, 1.5, 2.675, 999.999, 86'400'000.001, 999'999'999.999, 1e9, 1e15,
          0.1 + 0.2, -0.0, -1.25, std::numeric_limits<double>::infinity()})
        CHECK(to_line(Json(value)) == Json(value).dump());
    for (unsigned us = 0; us < 200'000; us += 7) {
        const double value = us / 1000.0;
        if (to_line(Json(value)) != Json(value).dump())
            FAIL(value);
    }
    CHECK(to_line(Json::object()) == "{}");
    CHECK(to_line(Json("alone")) == "\"alone\"");
}

TEST_CASE("a refused connection's record, word for word")
{
    Verdict verdict = race(Variant::none);
    verdict.cause = Cause::connect_refused;
    CHECK(to_line(verdict_of(refused(), verdict)) ==
          R"({"timestamp":"2026-01-31T12:00:05.000250000Z","event":{"name":"finrace.verdict"},)"
          R"("host":{"name":"proxy-1"},"process":{"pid":1234,"executable":{"name":"nginx"}},)"
          R"("network":{"transport":"tcp","type":"ipv4","local":{"address":"10.0.0.1","port":41234},)"
          R"("peer":{"address":"10.0.0.2","port":8000}},)"
          R"("finrace":{"schema":1,"cause":"connect_refused","certainty":"proven","side":"client",)"
          R"("message":"They crossed.","connection":{"id":"abcdef0123456789","age_ms":0.25,"netns":4026531840},)"
          R"("close":{"by":"peer","how":"reset"},)"
          R"("evidence":{"event":"open_failed","state":"CLOSE","reset_ack":true,"quiet_before_close_ms":0,)"
          R"("retransmits":0,"unread_bytes":0,"socket_error":"ECONNREFUSED"},"lost_events":0,"incomplete":false}})");
}

TEST_CASE("a server's record, word for word")
{
    const Verdict verdict{.cause = Cause::closed_on_request,
                          .variant = Variant::none,
                          .certainty = Certainty::likely,
                          .incomplete = false,
                          .message = "Closed."};
    event e = closed_unread();
    e.connection.flags |= CONNECTION_PROCESS_ENDS;
    e.exit_code = 9;
    CHECK(to_line(verdict_of(e, verdict)) ==
          R"({"timestamp":"2026-01-31T12:00:10.021000000Z","event":{"name":"finrace.verdict"},)"
          R"("host":{"name":"proxy-1"},"process":{"pid":77,"executable":{"name":"gunicorn"}},)"
          R"("network":{"transport":"tcp","type":"ipv4","local":{"address":"10.0.0.2","port":8000},)"
          R"("peer":{"address":"10.0.0.1","port":41234}},)"
          R"("finrace":{"schema":1,"cause":"closed_on_request","certainty":"likely","side":"server",)"
          R"("message":"Closed.","connection":{"idle_ms":981},"close":{"by":"local","how":"reset"},)"
          R"("evidence":{"event":"closed","state":"CLOSE","retransmits":0,"unread_bytes":176,"unacked_bytes":0,)"
          R"("exit_signal":9},"lost_events":0,"incomplete":false}})");
}

TEST_CASE("the server's end in its client's record")
{
    event e = late_segment();
    const Json late = verdict_record(origin, crossing(), race(), Upstream{}, "", {}, &e);
    CHECK(late["finrace"]["server_end"].dump() ==
          R"({"event":"segment_after_close","unread_bytes":0,"late_bytes":176})");
    e = closed_unread();
    e.connection.flags |= CONNECTION_PROCESS_ENDS;
    e.exit_code = 3 << 8;
    const Json unread = verdict_record(origin, crossing(), race(), Upstream{}, "", {}, &e);
    CHECK(unread["finrace"]["server_end"].dump() ==
          R"({"event":"closed","pid":77,"name":"gunicorn","unread_bytes":176,"exit_status":3})");
    event overflow{};
    overflow.kind = EVENT_ACCEPT_OVERFLOW;
    overflow.family = 6;
    overflow.old_state = overflow.new_state = TCP_STATE_LISTEN;
    overflow.local_port = 80;
    overflow.peer_port = 1;
    overflow.accept_queue = 129;
    overflow.turned_away = 3;
    const Json full = verdict_of(overflow);
    CHECK(full["finrace"]["evidence"].dump() ==
          R"({"event":"accept_overflow","state":"LISTEN","retransmits":0,"accept_queue":129,"turned_away":3})");
    CHECK(check_records({to_line(full), to_line(late), to_line(unread), to_line(verdict_of(closed_unread())),
                         to_line(verdict_of(late_segment()))}) == 0);
}

TEST_CASE("what the source could not observe is absent")
{
    event e = crossing();
    e.observed = 0;
    e.connection.pid = 0;
    e.connection.opened_ns = 0;
    e.srtt_us = 0;
    e.connection.flags |= CONNECTION_ADOPTED | CONNECTION_CARRIED | CONNECTION_PEER_RESET;
    const Json record = verdict_of(e);
    CHECK_FALSE(record.contains("process"));
    const Json& finrace = record["finrace"];
    CHECK_FALSE(finrace["connection"].contains("netns"));
    CHECK_FALSE(finrace["connection"].contains("age_ms"));
    CHECK(finrace["connection"]["adopted"] == true);
    CHECK_FALSE(finrace.contains("upstream"));
    for (const char* name : {"srtt_us", "unread_bytes", "socket_error", "reset_ack", "reset_at_fin"})
        CHECK_FALSE(finrace["evidence"].contains(name));
}

TEST_CASE("a request that was under way when the tracer started has no beginning and no size")
{
    event e = crossing();
    e.connection.exchange = 1;
    e.connection.flags |= CONNECTION_ADOPTED | CONNECTION_ADOPTED_IN_EXCHANGE;
    const Json finrace = verdict_of(e)["finrace"];
    CHECK_FALSE(finrace["request"].contains("bytes"));
    CHECK_FALSE(finrace.contains("response"));
    CHECK_FALSE(finrace["connection"].contains("idle_ms"));
    CHECK_FALSE(finrace["close"].contains("after_request_ms"));
    CHECK_FALSE(finrace["evidence"].contains("peer_fin_ms"));
}

TEST_CASE("a stale send: the close lies before the request, whose size is not known yet")
{
    event e = in_exchange(EVENT_SENT_AFTER_FIN, request_at);
    e.request_bytes = 0;
    e.connection.flags |= CONNECTION_PEER_FIN | CONNECTION_SENT_AFTER_FIN;
    e.connection.peer_fin_ns = request_at - 350'000;
    const Json finrace = verdict_of(e)["finrace"];
    CHECK(finrace["close"]["after_request_ms"] == -0.35);
    CHECK_FALSE(finrace.contains("request"));
    CHECK(finrace["evidence"]["sent_after_fin"] == true);
    CHECK_FALSE(finrace["evidence"].contains("fin_unacked_bytes"));
}

TEST_CASE("the request's unacknowledged bytes are those of the first close")
{
    event e = in_exchange(EVENT_PEER_RESET, request_at + ms);
    e.unacked_bytes = 176; // an RST's ACK never reaches the socket
    e.connection.flags |= CONNECTION_PEER_RESET | CONNECTION_RESET_HAS_ACK;
    e.connection.peer_reset_ns = e.timestamp_ns;
    e.connection.reset_unacked = 0;
    CHECK(unacked_by_close(e) == 0U);
    e.connection.flags &= ~static_cast<std::uint32_t>(CONNECTION_RESET_HAS_ACK);
    CHECK(unacked_by_close(e) == 176U);
    e.connection.exchange = 0;
    CHECK_FALSE(unacked_by_close(e));
}

TEST_CASE("who closed first, and how")
{
    const auto close_of = [](std::uint8_t kind, std::uint32_t flags, std::uint16_t error) {
        event e = in_exchange(kind, request_at);
        e.connection.flags |= flags;
        e.socket_error = error;
        const std::optional<Close> close = first_close(e);
        return close ? std::string(to_string(close->by)) + " " + std::string(to_string(close->how)) : std::string();
    };
    CHECK(close_of(EVENT_CLOSED, CONNECTION_PEER_FIN | CONNECTION_LOCAL_FIN, 0) == "peer fin");
    CHECK(close_of(EVENT_CLOSED, CONNECTION_PEER_FIN | CONNECTION_PEER_RESET, 0) == "peer fin");
    CHECK(close_of(EVENT_CLOSED, CONNECTION_PEER_RESET, 0) == "peer reset");
    CHECK(close_of(EVENT_CLOSED, CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN | CONNECTION_PEER_FIN, 0) ==
          "local fin");
    CHECK(close_of(EVENT_CLOSED, CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_RESET, 0) == "local reset");
    CHECK(close_of(EVENT_CLOSED, 0, ETIMEDOUT) == "local timeout");
    CHECK(close_of(EVENT_CLOSED, 0, 0).empty());
    CHECK(close_of(EVENT_OPEN_FAILED, CONNECTION_PEER_RESET, ECONNREFUSED) == "peer reset");
    CHECK(close_of(EVENT_OPEN_FAILED, 0, ETIMEDOUT) == "local timeout");
    CHECK(close_of(EVENT_OPEN_FAILED, 0, EHOSTUNREACH).empty());

    // A proxy closes at an upstream's close_notify, behind which the FIN is under way already.
    event e = in_exchange(EVENT_CLOSED, request_at + 30 * ms);
    e.srtt_us = 40'000;
    e.unacked_bytes = 176;
    e.connection.flags |= CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN | CONNECTION_PEER_FIN;
    e.connection.local_close_ns = request_at + 25 * ms;
    e.connection.peer_fin_ns = e.connection.local_close_ns + 19 * ms;
    e.connection.fin_unacked = 170;
    REQUIRE(first_close(e));
    CHECK(first_close(e)->by == Close::By::peer);
    CHECK(first_close(e)->at_ns == e.connection.peer_fin_ns);
    CHECK(unacked_by_close(e) == 170U);
    e.connection.peer_fin_ns += ms; // it may have left after this host's close
    CHECK(first_close(e)->by == Close::By::local);
    CHECK(unacked_by_close(e) == 176U);
    e.connection.peer_fin_ns -= ms;
    e.connection.fin_unacked = 0; // it knew of the request, and may have known of the close
    CHECK(first_close(e)->by == Close::By::local);
}

TEST_CASE("a process name of any bytes makes valid JSON")
{
    event e = crossing();
    set_name(e, std::string_view("\xff\xfe\"\\\n\x01\xc3(\xe2\x82", 10));
    const std::string line = to_line(verdict_of(e));
    CHECK(line.find('\n') == std::string::npos);
    const nlohmann::json parsed = nlohmann::json::parse(line);
    CHECK(parsed["process"]["executable"]["name"] == "\xef\xbf\xbd\xef\xbf\xbd\"\\\n\x01\xef\xbf\xbd(\xef\xbf\xbd");

    e.connection.comm[0] = '\0';
    CHECK(verdict_record(origin, e, race(), Upstream{}, "late")["process"]["executable"]["name"] == "late");
    CHECK_FALSE(verdict_of(e)["process"].contains("executable"));
}

TEST_CASE("lost events are named")
{
    event e = crossing();
    e.connection.lost_events = 2;
    e.connection.lost_kinds = 1U << EVENT_OPENED | 1U << EVENT_PEER_RESET;
    Verdict verdict = race();
    verdict.incomplete = true;
    const Json finrace = verdict_of(e, verdict)["finrace"];
    CHECK(finrace["lost_events"] == 2);
    CHECK(finrace["lost_kinds"] == Json({"opened", "peer_reset"}));
    CHECK(finrace["incomplete"] == true);
}

TEST_CASE("a whole connection with its states")
{
    StateHistories histories;
    event e = in_exchange(EVENT_STATE, 4'990 * ms);
    e.old_state = TCP_STATE_CLOSE;
    e.new_state = TCP_STATE_SYN_SENT;
    histories.add(e);
    for (int twice = 0; twice < 2; ++twice) {
        e = in_exchange(EVENT_OPENED, 5'000 * ms);
        e.old_state = TCP_STATE_SYN_SENT;
        e.new_state = TCP_STATE_ESTABLISHED;
        histories.add(e);
    }
    e = crossing();
    e.old_state = TCP_STATE_ESTABLISHED;
    histories.add(e);
    e = crossing_closed();
    e.bytes_sent = 528;
    e.bytes_received = 1000;
    histories.add(e);
    const Json record = connection_record(origin, e, histories.take(e.connection.id), "");
    CHECK(histories.size() == 0);
    const Json& connection = record["finrace"]["connection"];
    CHECK(connection["states"].dump() ==
          R"([{"state":"SYN_SENT","at":"2026-01-31T12:00:04.990000000Z","ms":10.0},)"
          R"({"state":"ESTABLISHED","at":"2026-01-31T12:00:05.000000000Z","ms":5020.113},)"
          R"({"state":"CLOSE_WAIT","at":"2026-01-31T12:00:10.020113000Z","ms":20.0},)"
          R"({"state":"CLOSE","at":"2026-01-31T12:00:10.040113000Z"}])");
    CHECK(connection["exchanges"] == 3);
    CHECK(connection["bytes_sent"] == 528);
    CHECK(connection["bytes_received"] == 1000);
    CHECK(connection["opened_by"] == "local");
    CHECK(record["finrace"]["close"] == Json({{"by", "peer"}, {"how", "fin"}}));
}

TEST_CASE("what became of the exchange")
{
    const auto finrace_of = [](const Outcome& outcome) {
        return verdict_record(origin, crossing(), race(), known_upstream(), "x", outcome);
    };
    CHECK(!finrace_of({})["finrace"].contains("outcome"));
    const Json whole = finrace_of(retried());
    CHECK(
        whole["finrace"]["outcome"].dump() ==
        R"({"retried":true,"retry":{"connection_id":"ff","peer_address":"10.0.0.3","peer_port":8001,"after_ms":0.25},)"
        R"("client_address":"192.0.2.7","client_port":4000,"client_left":false,"client_answered":true,)"
        R"("certainty":"possible"})");
    CHECK(whole["http"]["response"]["status_code"] == 200);

    Outcome outcome = retried();
    outcome.client->status = 0; // not HTTP/1 in plain text
    CHECK(!finrace_of(outcome).contains("http"));
    outcome.retry.reset();
    CHECK(finrace_of(outcome)["finrace"]["outcome"]["retried"] == false);
    outcome.known = false;
    CHECK(!finrace_of(outcome)["finrace"]["outcome"].contains("retried"));
    outcome = retried();
    outcome.client.reset();
    CHECK(finrace_of(outcome)["finrace"]["outcome"].size() == 2);
}

TEST_CASE("states that were missed have no time")
{
    StateHistories histories(2);
    event e = crossing_closed(); // nothing before it was seen
    histories.add(e);
    const std::vector<StateStep> steps = histories.take(e.connection.id);
    REQUIRE(steps.size() == 2);
    CHECK(steps[0].state == TCP_STATE_CLOSE_WAIT);
    CHECK(steps[0].at_ns == 0);
    CHECK(steps[1].at_ns == e.timestamp_ns);

    for (const std::uint64_t id : {1U, 2U, 3U}) {
        e.connection.id = id;
        histories.add(e);
    }
    CHECK(histories.size() == 2);
    CHECK(histories.take(1).empty());
    CHECK(histories.take(3).size() == 2);
}

TEST_CASE("losses make a run's health incomplete")
{
    CHECK(health_record(origin, 0, healthy())["finrace"]["health"]["complete"] == true);
    Health health = healthy();
    health.losses.by_place[LOSS_TABLE_FULL] = 1;
    CHECK(health_record(origin, 0, health)["finrace"]["health"]["complete"] == false);
    health = healthy();
    health.outputs[0].dropped = 4;
    const Json dropped = health_record(origin, 0, health);
    CHECK(dropped["finrace"]["health"]["complete"] == false);
    CHECK(dropped["finrace"]["output"]["dropped"] == 4);
    health = healthy();
    health.losses.by_place[LOSS_RING_FULL] = 9;
    health.losses.by_kind[EVENT_CLOSED] = 9;
    const Json finrace = health_record(origin, 0, health)["finrace"];
    CHECK(finrace["lost_events"] == 9);
    CHECK(finrace["health"]["losses"]["events_by_kind"] == Json({{"closed", 9}}));
}

TEST_CASE("every kind of record conforms to the schema, and nothing else does")
{
    std::vector<std::string> lines;
    for (const CauseText& text : cause_texts()) {
        Verdict verdict = race(Variant::none);
        verdict.cause = text.cause;
        lines.push_back(to_line(verdict_of(crossing(), verdict)));
    }
    for (int variant = 0; variant <= static_cast<int>(Variant::unanswered_probes); ++variant)
        lines.push_back(to_line(
            verdict_record(origin, crossing_closed(), race(static_cast<Variant>(variant)), known_upstream(), "x")));
    lines.push_back(to_line(verdict_record(origin, crossing(), race(), known_upstream(), "x", retried())));
    event answer = crossing();
    answer.kind = EVENT_CLIENT_ANSWERED;
    answer.timestamp_ns += 40'000'000;
    answer.http_status = 502;
    answer.untried = 3;
    const Benched benched{.loss = crossing(), .cause = Cause::keepalive_race, .answer = answer};
    const Json secondary = benched_record(origin, crossing(), benched, judge_benched(benched), "nginx", retried());
    CHECK(secondary["finrace"]["cause"] == "upstream_benched");
    CHECK(secondary["finrace"]["caused_by"]["connection_id"] == secondary["finrace"]["connection"]["id"]);
    CHECK(secondary["finrace"]["evidence"]["untried_answers"] == 3);
    lines.push_back(to_line(secondary));
    for (unsigned kind = 1; kind < EVENT_RELEASED; ++kind) {
        if (kind == EVENT_OPENED || kind == EVENT_STATE)
            continue; // nothing ends with these
        event e = crossing_closed();
        e.kind = static_cast<std::uint8_t>(kind);
        e.family = 6;
        e.connection.lost_events = 255;
        e.connection.lost_kinds = 0xffff;
        e.connection.flags = 0xffffffffU;
        e.socket_error = 200; // no errno has this number
        lines.push_back(to_line(verdict_of(e)));
    }
    const std::vector<StateStep> states{{.state = TCP_STATE_SYN_RECV, .at_ns = 0},
                                        {.state = TCP_STATE_ESTABLISHED, .at_ns = 5},
                                        {.state = TCP_STATE_CLOSE, .at_ns = 6}};
    lines.push_back(to_line(connection_record(origin, crossing_closed(), states, "")));
    lines.push_back(to_line(connection_record(origin, refused(), {}, "")));
    Upstream upstream = known_upstream();
    upstream.counts.verdicts[Cause::stale_reuse] = 2;
    const UpstreamKey key = UpstreamKey::of(crossing());
    Exposure exposed;
    exposed.state = PoolState::exposed;
    exposed.told_by = 7;
    lines.push_back(to_line(upstream_record(origin, 1, &key, upstream, exposed)));
    lines.push_back(to_line(upstream_record(origin, 1, nullptr, Upstream{}, Exposure{})));
    lines.push_back(to_line(health_record(origin, 1, healthy())));
    Health health = healthy();
    health.attach.clear();
    health.backend = "cgroup";
    health.losses.by_kind[EVENT_STATE] = 1;
    health.missing_hooks.push_back({.name = "a", .purpose = "b", .problem = "c"});
    lines.push_back(to_line(health_record(origin, 1, health)));
    CHECK(check_records(lines) == 0);

    // A field that nobody documented, at each level that has one, and a record of no known kind.
    for (const char* pointer : {"/new", "/network/new", "/finrace/new", "/finrace/connection/new",
                                "/finrace/evidence/new", "/process/executable/new", "/finrace/close/new", "/http/new",
                                "/http/response/new", "/finrace/outcome/new", "/finrace/outcome/retry/new"}) {
        CAPTURE(pointer);
        Json record = verdict_record(origin, crossing(), race(), known_upstream(), "x", retried());
        record[Json::json_pointer(pointer)] = 1;
        CHECK(check_records({to_line(record)}) == 1);
    }
    Json record = verdict_of(crossing());
    record["event"]["name"] = "finrace.other";
    CHECK(check_records({to_line(record)}) == 1);
}

TEST_CASE("on one level a value's name is the whole way to it")
{
    const Json record = {{"event", {{"name", "finrace.verdict"}}},
                         {"finrace", {{"cause", "keepalive_race"}, {"kinds", {"a", "b"}}, {"none", Json::object()}}}};
    CHECK(
        to_line(flattened(record)) ==
        R"({"event.name":"finrace.verdict","finrace.cause":"keepalive_race","finrace.kinds":["a","b"],"finrace.none":{}})");
}

TEST_CASE("a request's sequence number tells the two ends of its connection")
{
    event e = crossing_closed();
    e.connection.request_seq = 4'000'000'000U;
    CHECK(verdict_of(e)["finrace"]["request"]["sequence_number"] == 4'000'000'000U);
    e.connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN; // accepted here
    e.unread_seq = 0;
    CHECK(!verdict_of(e)["finrace"].contains("request"));
    e.unread_seq = 4'000'000'010U;
    CHECK(verdict_of(e)["finrace"]["request"]["sequence_number"] == 4'000'000'010U);
}

TEST_CASE("an upstream's record tells what may be expected of its pool, and who uses it")
{
    Upstream upstream = known_upstream();
    const UpstreamKey key = UpstreamKey::of(crossing());
    const auto told = [&](const Exposure& exposure) {
        return upstream_record(origin, 1, &key, upstream, exposure)["finrace"]["upstream"];
    };
    CHECK(!told({}).contains("process"));
    CHECK(to_line(told({})["exposure"]) == R"({"state":"unknown"})");
    std::copy_n("nginx", 5, upstream.owner.begin());
    Exposure exposure;
    exposure.state = PoolState::exposed;
    CHECK(told(exposure)["process"] == "nginx");
    CHECK(!told(exposure)["exposure"].contains("races_a_day"));
    exposure.told_by = 25;
    exposure.races_a_day = 40;
    CHECK(told(exposure)["exposure"]["races_a_day"] == 40);
}
