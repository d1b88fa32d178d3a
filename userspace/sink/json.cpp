// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/json.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/flags.h"
#include "core/server_end.h"
#include "sink/facts.h"

namespace finrace {

namespace {

// A record for each connection is what costs most here (run --connections). Its objects are filled member by member: a
// list in braces is built first, then copied. And they have room from the start: an object that grows copies its keys,
// and leaves references to its members dangling. No more room than needed: what malloc() keeps at hand ends at 1,032
// bytes, 21 members.
Json object_for(std::size_t members)
{
    Json object = Json::object();
    object.get_ref<Json::object_t&>().reserve(members);
    return object;
}

/// One that is not there yet: operator[] would compare its name with all that are.
template <typename Value>
Json& add(Json& object, const char* name, Value&& value)
{
    auto& members = object.get_ref<Json::object_t&>();
    assert(members.find(name) == members.end());
    return members.emplace_back(name, std::forward<Value>(value)).second;
}

// More than any record has; a whole connection's has fewer.
constexpr std::size_t record_members = 12;
constexpr std::size_t finrace_members = 24;
constexpr std::size_t finrace_members_of_connection = 12;
constexpr std::size_t connection_members = 20;

Json begin_record(const Origin& origin, std::uint64_t monotonic_ns, std::string_view name)
{
    Json record = object_for(record_members);
    add(record, "timestamp", origin.clock.rfc3339(monotonic_ns));
    add(add(record, "event", object_for(1)), "name", name);
    add(add(record, "host", object_for(1)), "name", origin.host_name);
    return record;
}

Json& begin_finrace(Json& record, std::size_t members = finrace_members)
{
    Json& finrace = add(record, "finrace", object_for(members));
    add(finrace, "schema", record_schema);
    return finrace;
}

void add_process(Json& record, const connection& c, std::string_view fallback_name)
{
    if (c.pid == 0)
        return;
    Json& process = add(record, "process", object_for(3)); // pid, executable, linux
    add(process, "pid", c.pid);
    const std::string_view noted = owner_name(c);
    if (const std::string_view name = noted.empty() ? fallback_name : noted; !name.empty())
        add(add(process, "executable", object_for(1)), "name", name);
}

Json& begin_network(Json& record, unsigned family)
{
    Json& network = add(record, "network", object_for(4));
    add(network, "transport", "tcp");
    add(network, "type", family == 6 ? "ipv6" : "ipv4");
    return network;
}

void add_end(Json& network, const char* which, const std::uint8_t* address, unsigned family, unsigned port)
{
    Json& end = add(network, which, object_for(2));
    add(end, "address", address_text(address, family));
    add(end, "port", port);
}

void add_network(Json& record, const event& e)
{
    Json& network = begin_network(record, e.family);
    add_end(network, "local", e.local_address, e.family, e.local_port);
    add_end(network, "peer", e.peer_address, e.family, e.peer_port);
}

/// What the records of verdicts and of whole connections say alike about the connection.
Json connection_identity(const event& e)
{
    const connection& c = e.connection;
    Json result = object_for(connection_members);
    // A string: the number passes 2^53, beyond which many readers of JSON round. None if it is not followed.
    if (c.id != 0)
        add(result, "id", fmt::format("{:x}", c.id));
    if (c.opened_ns != 0)
        add(result, "age_ms", milliseconds_between(c.opened_ns, e.timestamp_ns));
    if ((e.observed & OBSERVED_NETNS) != 0 && e.netns != 0)
        add(result, "netns", e.netns);
    if (has(e, CONNECTION_ADOPTED))
        add(result, "adopted", true);
    if (const std::string_view protocol = protocol_name(c); !protocol.empty())
        add(result, "protocol", protocol);
    return result;
}

void add_close(Json& finrace, const event& e, bool after_request)
{
    const std::optional<Close> close = first_close(e);
    if (!close)
        return;
    Json& first = add(finrace, "close", object_for(3));
    add(first, "by", to_string(close->by));
    add(first, "how", to_string(close->how));
    if (after_request && knows_request_start(e.connection) && close->at_ns != 0)
        add(first, "after_request_ms", milliseconds_between(e.connection.request_ns, close->at_ns));
}

void add_losses(Json& finrace, const connection& c, bool incomplete)
{
    add(finrace, "lost_events", c.lost_events);
    if (c.lost_kinds != 0) {
        Json& kinds = add(finrace, "lost_kinds", Json::array());
        for (unsigned kind = 1; kind < EVENT_KINDS; ++kind)
            if ((c.lost_kinds & 1U << kind) != 0)
                kinds.push_back(kind_name(kind));
    }
    add(finrace, "incomplete", incomplete);
}

/// How the process that closed was ending, if it was.
void add_exit(Json& record, const event& e)
{
    if (const std::optional<Exit> exit = exit_of(e))
        record[exit->by_signal ? "exit_signal" : "exit_status"] = exit->number;
}

Json server_end_of(const event& e)
{
    Json result{{"event", kind_name(e.kind)}};
    if (e.connection.pid != 0) {
        result["pid"] = e.connection.pid;
        result["name"] = owner_name(e.connection);
    }
    result["unread_bytes"] = e.unread_bytes;
    if (e.segment_bytes != 0)
        result["late_bytes"] = e.segment_bytes;
    add_exit(result, e);
    return result;
}

Json evidence_of(const event& e)
{
    const connection& c = e.connection;
    Json evidence = Json::object();

    evidence["event"] = kind_name(e.kind);
    evidence["state"] = state_name(e.new_state);
    const auto add_time = [&](const char* name, std::uint64_t at_ns) {
        if (knows_request_start(c) && at_ns != 0)
            evidence[name] = milliseconds_between(c.request_ns, at_ns);
    };
    if (has(e, CONNECTION_PEER_FIN)) {
        add_time("peer_fin_ms", c.peer_fin_ns);
        // After a stale send, the accounting is the new request's, and the FIN knows nothing of that.
        if (c.exchange > 0 && !has(e, CONNECTION_SENT_AFTER_FIN))
            evidence["fin_unacked_bytes"] = c.fin_unacked;
    }
    if (has(e, CONNECTION_PEER_RESET)) {
        add_time("peer_reset_ms", c.peer_reset_ns);
        if ((e.observed & OBSERVED_RESET_HEADER) != 0 && !has(e, CONNECTION_RESET_FLAGS_UNKNOWN)) {
            evidence["reset_ack"] = has(e, CONNECTION_RESET_HAS_ACK);
            if (has(e, CONNECTION_RESET_HAS_ACK) && c.exchange > 0)
                evidence["reset_unacked_bytes"] = c.reset_unacked;
            if (has(e, CONNECTION_PEER_FIN)) {
                evidence["reset_at_fin"] = has(e, CONNECTION_RESET_AT_FIN);
                evidence["reset_beyond_fin"] = has(e, CONNECTION_RESET_BEYOND_FIN);
            }
        }
    }
    if (has(e, CONNECTION_PEER_FIN | CONNECTION_PEER_RESET))
        evidence["quiet_before_close_ms"] = c.fin_idle_ms;
    if (has(e, CONNECTION_LOCAL_FIN | CONNECTION_LOCAL_RESET))
        add_time("local_close_ms", c.local_close_ns);
    if (has(e, CONNECTION_SENT_AFTER_FIN))
        evidence["sent_after_fin"] = true;
    if (e.srtt_us != 0)
        evidence["srtt_us"] = e.srtt_us;
    evidence["retransmits"] = e.retransmits;
    if ((e.observed & OBSERVED_UNREAD) != 0)
        evidence["unread_bytes"] = e.unread_bytes;
    if (e.kind == EVENT_ACCEPT_OVERFLOW) {
        evidence["accept_queue"] = e.accept_queue;
        evidence["turned_away"] = e.turned_away;
    } else if (!is_client(e)) {
        evidence["unacked_bytes"] = e.unacked_bytes;
        if (e.segment_bytes != 0)
            evidence["late_bytes"] = e.segment_bytes;
        add_exit(evidence, e);
    }
    if ((e.observed & OBSERVED_SOCKET_ERROR) != 0 && e.socket_error != 0)
        evidence["socket_error"] = error_name(e.socket_error);
    return evidence;
}

Json exposure_json(const Exposure& exposure)
{
    Json json{{"state", to_string(exposure.state)}};
    if (exposure.state != PoolState::exposed)
        return json;
    json["window_ms"] = exposure.window_ms;
    json["late_reuses"] = exposure.late_reuses;
    if (exposure.expected()) {
        json["races_a_day"] = exposure.races_a_day;
        json["share"] = exposure.share;
        json["told_by"] = exposure.told_by;
    }
    return json;
}

void add_idle_timeout(Json& finrace, const Upstream& upstream)
{
    const std::optional<IdleTimeout> timeout = upstream.idle_timeout.timeout();
    if (!timeout)
        return;
    Json& known = finrace["upstream"];
    known["idle_timeout_ms"] = timeout->ms;
    known["spread_ms"] = timeout->spread_ms();
    known["samples"] = timeout->samples;
}

void add_outcome(Json& record, const Outcome& outcome)
{
    if (!outcome.known && !outcome.client)
        return;
    Json& result = record["finrace"]["outcome"] = Json::object();
    if (outcome.known)
        result["retried"] = outcome.retry.has_value();
    if (const auto& retry = outcome.retry)
        result["retry"] = {{"connection_id", fmt::format("{:x}", retry->connection_id)},
                           {"peer_address", address_text(retry->upstream.address.data(), retry->upstream.family)},
                           {"peer_port", retry->upstream.port},
                           {"after_ms", milliseconds_between(0, retry->after_ns)}};
    if (const auto& client = outcome.client) {
        result["client_address"] = address_text(client->address.data(), client->family);
        result["client_port"] = client->port;
        result["client_left"] = client->left;
        result["client_answered"] = client->answered;
        result["certainty"] = to_string(client->certainty);
        if (client->status != 0)
            record["http"]["response"]["status_code"] = client->status;
    }
}

Json counts_by_cause(const std::map<Cause, std::uint64_t>& counts)
{
    Json result = Json::object();
    for (const auto& [cause, count] : counts)
        result[std::string(to_string(cause))] = count;
    return result;
}

} // namespace

Json verdict_record(const Origin& origin, const event& e, const Verdict& verdict, const Upstream& upstream,
                    std::string_view process_name, const Outcome& outcome, const event* server_end)
{
    const connection& c = e.connection;
    Json record = begin_record(origin, e.timestamp_ns, "finrace.verdict");
    add_process(record, c, process_name);
    add_network(record, e);

    Json& finrace = begin_finrace(record);
    finrace["cause"] = to_string(verdict.cause);
    if (verdict.variant != Variant::none)
        finrace["variant"] = to_string(verdict.variant);
    finrace["certainty"] = to_string(verdict.certainty);
    if (verdict.reason)
        finrace["reason"] = to_string(*verdict.reason);
    finrace["side"] = is_client(e) ? "client" : "server";
    finrace["message"] = verdict.message;

    Json& of_connection = finrace["connection"] = connection_identity(e);
    if (!is_client(e)) { // requests come in there: the accounting of what this side sends is about answers
        if (const std::uint64_t rest_ms = rest_before_request_ms(e); rest_ms != 0)
            of_connection["idle_ms"] = rest_ms;
        if (e.unread_seq != 0 && e.kind != EVENT_ACCEPT_OVERFLOW)
            finrace["request"]["sequence_number"] = e.unread_seq;
        add_close(finrace, e, false);
        finrace["evidence"] = evidence_of(e);
        add_losses(finrace, c, verdict.incomplete);
        return record;
    }
    const bool whole_exchange = c.exchange > 0 && !has(e, CONNECTION_ADOPTED_IN_EXCHANGE);
    if (c.exchange > 0) {
        of_connection["exchange"] = c.exchange;
        of_connection["reused"] = is_reused(c);
    }
    if (whole_exchange) {
        of_connection["idle_ms"] = c.idle_ms;
        // At the moment of a stale send nothing of the request has been queued yet: its size is not known.
        if (e.request_bytes > 0) {
            finrace["request"]["bytes"] = e.request_bytes;
            finrace["request"]["sequence_number"] = c.request_seq;
        }
        finrace["response"]["bytes"] = e.response_bytes;
    }
    if (const std::optional<std::uint32_t> unacked = unacked_by_close(e))
        finrace["request"]["unacked_bytes"] = *unacked;
    add_close(finrace, e, true);
    add_outcome(record, outcome);
    add_idle_timeout(finrace, upstream);
    finrace["evidence"] = evidence_of(e);
    if (server_end != nullptr)
        finrace["server_end"] = server_end_of(*server_end);
    add_losses(finrace, c, verdict.incomplete);
    return record;
}

Json benched_record(const Origin& origin, const event& loss, const Benched& benched, const Verdict& verdict,
                    std::string_view process_name, const Outcome& outcome)
{
    Json record = begin_record(origin, loss.timestamp_ns, "finrace.verdict");
    add_process(record, loss.connection, process_name);
    add_network(record, loss);
    Json& finrace = begin_finrace(record);
    finrace["cause"] = to_string(verdict.cause);
    finrace["certainty"] = to_string(verdict.certainty);
    finrace["side"] = "client";
    finrace["message"] = verdict.message;
    finrace["connection"] = connection_identity(loss);
    finrace["caused_by"] = {{"cause", to_string(benched.cause)},
                            {"connection_id", fmt::format("{:x}", loss.connection.id)},
                            {"before_ms", milliseconds_between(benched.loss.timestamp_ns, loss.timestamp_ns)}};
    add_outcome(record, outcome);
    finrace["evidence"] = {{"event", kind_name(benched.answer.kind)},
                           {"state", state_name(benched.answer.new_state)},
                           {"retransmits", benched.answer.retransmits},
                           {"untried_answers", benched.answer.untried}};
    add_losses(finrace, loss.connection, verdict.incomplete);
    return record;
}

Json connection_record(const Origin& origin, const event& e, std::span<const StateStep> states,
                       std::string_view process_name)
{
    const connection& c = e.connection;
    const bool failed = e.kind == EVENT_OPEN_FAILED;
    Json record = begin_record(origin, e.timestamp_ns, "finrace.connection");
    add_process(record, c, process_name);
    add_network(record, e);

    Json& finrace = begin_finrace(record, finrace_members_of_connection);
    add(finrace, "side", is_client(e) ? "client" : "server");

    Json& of_connection = add(finrace, "connection", connection_identity(e));
    add(of_connection, "opened_by", is_client(e) ? "local" : "peer");
    add(of_connection, "outcome", failed ? "open_failed" : "closed");
    if ((e.observed & OBSERVED_SOCKET_ERROR) != 0 && e.socket_error != 0)
        add(of_connection, "error", error_name(e.socket_error));
    else if (failed && has(e, CONNECTION_PEER_RESET))
        add(of_connection, "error", error_name(ECONNREFUSED)); // what the kernel makes of it, seen or not
    if (!failed) {
        add(of_connection, "exchanges", c.exchange);
        add(of_connection, "bytes_sent", e.bytes_sent);
        add(of_connection, "bytes_received", e.bytes_received);
        if (c.exchange > 0)
            add(of_connection, "longest_idle_ms", c.longest_idle_ms);
    }
    if (e.srtt_us != 0)
        add(of_connection, "srtt_us", e.srtt_us);
    add(of_connection, "retransmits", e.retransmits);

    Json& steps = add(of_connection, "states", Json::array());
    steps.get_ref<Json::array_t&>().reserve(states.size());
    for (std::size_t i = 0; i < states.size(); ++i) {
        Json& step = steps.emplace_back(object_for(3));
        add(step, "state", state_name(states[i].state));
        if (states[i].at_ns != 0) {
            add(step, "at", origin.clock.rfc3339(states[i].at_ns));
            if (i + 1 < states.size() && states[i + 1].at_ns != 0)
                add(step, "ms", milliseconds_between(states[i].at_ns, states[i + 1].at_ns));
        }
    }
    add_close(finrace, e, false);
    add_losses(finrace, c, c.lost_events > 0 || has(e, CONNECTION_ADOPTED));
    return record;
}

Json timeout_json(const IdleTimeout& timeout)
{
    return {{"ms", timeout.ms}, {"spread_ms", timeout.spread_ms()}, {"samples", timeout.samples}};
}

Json upstream_record(const Origin& origin, std::uint64_t monotonic_ns, const UpstreamKey* key, const Upstream& upstream,
                     const Exposure& exposure)
{
    Json record = begin_record(origin, monotonic_ns, "finrace.upstream");
    if (key != nullptr)
        add_end(begin_network(record, key->family), "peer", key->address.data(), key->family, key->port);
    Json& finrace = begin_finrace(record);
    finrace["side"] = "client";

    const UpstreamCounts& counts = upstream.counts;
    finrace["upstream"] = Json::object();
    add_idle_timeout(finrace, upstream);
    Json& of_upstream = finrace["upstream"];
    if (key == nullptr)
        of_upstream["other"] = true;
    else if (key->netns != 0)
        of_upstream["netns"] = key->netns;
    if (upstream.owner[0] != '\0')
        of_upstream["process"] =
            std::string(upstream.owner.data(), ::strnlen(upstream.owner.data(), upstream.owner.size()));
    of_upstream["longest_reused_idle_ms"] = upstream.longest_reused_idle_ms;
    if (const std::optional<IdleTimeout> own = upstream.own_idle_limit.timeout())
        of_upstream["own_idle_limit"] = timeout_json(*own);
    if (key != nullptr)
        of_upstream["exposure"] = exposure_json(exposure);
    of_upstream["connections"] = {
        {"opened", counts.opened}, {"open_failed", counts.open_failed}, {"closed", counts.closed}};
    of_upstream["exchanges"] = counts.exchanges;
    of_upstream["idle_closes"] = {{"by_peer", counts.idle_closes_by_peer}, {"by_local", counts.idle_closes_by_local}};
    of_upstream["complete_closes"] = counts.complete_closes;
    of_upstream["verdicts"] = counts_by_cause(counts.verdicts);
    of_upstream["unclassified"] = counts.unclassified;
    return record;
}

OutputState sum_of(std::span<const OutputState> outputs)
{
    OutputState sum;
    for (const OutputState& output : outputs) {
        sum.written += output.written;
        sum.dropped += output.dropped;
        sum.bytes_waiting += output.bytes_waiting;
    }
    return sum;
}

Json health_record(const Origin& origin, std::uint64_t monotonic_ns, const Health& health)
{
    Json record = begin_record(origin, monotonic_ns, "finrace.health");
    Json& finrace = begin_finrace(record);

    const OutputState sum = sum_of(health.outputs);
    Json outputs = Json::array();
    const auto list = [&outputs](const OutputState& output) {
        Json& one = outputs.emplace_back(Json{{"name", output.name},
                                              {"written", output.written},
                                              {"dropped", output.dropped},
                                              {"bytes_waiting", output.bytes_waiting}});
        if (output.problem != 0)
            one["problem"] = error_name(output.problem);
    };
    std::for_each(health.outputs.begin(), health.outputs.end(), list);
    std::for_each(health.beside.begin(), health.beside.end(), list);
    std::uint64_t lost = sum.dropped;
    Json by_place = Json::object();
    for (unsigned place = 0; place < LOSS_PLACES; ++place) {
        by_place[std::string(loss_name(place))] = health.losses.by_place[place];
        lost += health.losses.by_place[place];
    }
    Json by_kind = Json::object();
    for (unsigned kind = 1; kind < EVENT_KINDS; ++kind)
        if (health.losses.by_kind[kind] > 0)
            by_kind[std::string(kind_name(kind))] = health.losses.by_kind[kind];

    Json& of_health = finrace["health"];
    of_health["complete"] = lost == 0;
    of_health["last"] = health.last;
    of_health["version"] = health.version;
    of_health["backend"] = health.backend;
    if (!health.attach.empty())
        of_health["attach"] = health.attach;
    of_health["interval_ms"] = std::chrono::duration_cast<std::chrono::milliseconds>(health.interval).count();
    of_health["uptime_ms"] = std::chrono::duration_cast<std::chrono::milliseconds>(health.uptime).count();
    of_health["connections"] = {
        {"begun", health.connections_begun},
        {"adopted", health.connections_adopted},
        {"open_estimate",
         health.connections_begun > health.connections_ended ? health.connections_begun - health.connections_ended : 0},
    };
    of_health["events"] = health.events;
    of_health["outcome_events"] = health.outcome_events;
    of_health["losses"] = std::move(by_place);
    of_health["losses"]["events_by_kind"] = std::move(by_kind);
    of_health["upstreams"] = health.upstreams;
    of_health["verdicts"] = counts_by_cause(health.verdicts);
    of_health["unclassified"] = health.unclassified;
    of_health["hooks_missing"] = health.missing_hooks.size();
    Json& missing = of_health["missing_hooks"] = Json::array();
    for (const MissingHook& hook : health.missing_hooks)
        missing.push_back({{"name", hook.name}, {"purpose", hook.purpose}, {"problem", hook.problem}});
    if (health.confinement)
        of_health["confinement"] = {{"files", health.confinement->files},
                                    {"system_calls", health.confinement->system_calls},
                                    {"capabilities", health.confinement->capabilities}};

    finrace["output"] = {{"written", sum.written}, {"dropped", sum.dropped}, {"bytes_waiting", sum.bytes_waiting}};
    finrace["outputs"] = std::move(outputs);
    finrace["lost_events"] = health.losses.by_place[LOSS_RING_FULL];
    return record;
}

namespace {

void flatten_into(Json& flat, const std::string& name, const Json& value)
{
    if (!value.is_object() || value.empty()) {
        flat[name] = value;
        return;
    }
    for (const auto& [key, inner] : value.items())
        flatten_into(flat, name.empty() ? key : fmt::format("{}.{}", name, key), inner);
}

} // namespace

Json flattened(const Json& record)
{
    Json flat = Json::object();
    flatten_into(flat, "", record);
    return flat;
}

namespace {

/// What the library makes of it, and no control character that JSON may have as it is.
void append_escaped(std::string& line, const std::string& text)
{
    std::string escaped = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
    for (std::size_t at = 0; (at = escaped.find_first_of("\x7f\xc2", at)) != std::string::npos; ++at) {
        const bool is_delete = escaped[at] == '\x7f';
        const auto code =
            static_cast<unsigned char>(is_delete ? escaped[at] : escaped[at + 1]); // U+0080 to U+00BF: C2 80 to C2 BF
        if (is_delete || code < 0xa0)
            escaped.replace(at, is_delete ? 1 : 2, fmt::format("\\u{:04x}", code));
    }
    line += escaped;
}

/// 1 for the bytes that need no escape.
constexpr std::array<std::uint8_t, 256> plain_bytes = [] {
    std::array<std::uint8_t, 256> plain{};
    for (unsigned byte = ' '; byte < 0x7f; ++byte)
        plain[byte] = byte != '"' && byte != '\\';
    return plain;
}();

void append_text(std::string& line, const std::string& text)
{
    std::uint8_t plain = 1;
    for (const char byte : text)
        plain &= plain_bytes[static_cast<unsigned char>(byte)];
    if (plain == 0) {
        append_escaped(line, text);
        return;
    }
    line += '"';
    line += text;
    line += '"';
}

/// Most are milliseconds with three decimals: the shortest text that reads back as such a number is those decimals, as
/// long as it has no more than 15 digits, which a double always keeps.
void append_number(std::string& line, double value)
{
    constexpr double most = 1e9;
    const double thousandths = std::nearbyint(value * 1000);
    if (!(value >= 0 && value < most) || std::signbit(value) || thousandths / 1000 != value) {
        line += Json(value).dump();
        return;
    }
    const auto count = static_cast<std::uint64_t>(thousandths);
    line += fmt::format_int(count / 1000).c_str();
    std::array<char, 4> decimals{'.', static_cast<char>('0' + count / 100 % 10),
                                 static_cast<char>('0' + count / 10 % 10), static_cast<char>('0' + count % 10)};
    std::size_t shown = decimals.size();
    while (shown > 2 && decimals[shown - 1] == '0')
        --shown;
    line.append(decimals.data(), shown);
}

/// Over the comma after the last member, if there is any.
void append_end(std::string& line, char end)
{
    if (line.back() == ',')
        line.back() = end;
    else
        line += end;
}

void append(std::string& line, const Json& value)
{
    switch (value.type()) {
    case Json::value_t::object:
        line += '{';
        for (const auto& [key, inner] : value.get_ref<const Json::object_t&>()) {
            append_text(line, key);
            line += ':';
            append(line, inner);
            line += ',';
        }
        append_end(line, '}');
        break;
    case Json::value_t::array:
        line += '[';
        for (const Json& inner : value) {
            append(line, inner);
            line += ',';
        }
        append_end(line, ']');
        break;
    case Json::value_t::string:
        append_text(line, value.get_ref<const std::string&>());
        break;
    case Json::value_t::number_unsigned:
        line += fmt::format_int(value.get<std::uint64_t>()).c_str();
        break;
    case Json::value_t::number_float:
        append_number(line, value.get<double>());
        break;
    default:
        line += value.dump();
        break;
    }
}

} // namespace

void write_line(std::string& line, const Json& record)
{
    line.clear();
    append(line, record);
}

std::string to_line(const Json& record)
{
    std::string line;
    write_line(line, record);
    return line;
}

} // namespace finrace
