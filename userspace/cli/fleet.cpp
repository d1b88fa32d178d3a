// SPDX-License-Identifier: GPL-2.0-only OR MIT
// ClickHouse adds up what is alike; what becomes of it is decided here. packaging/clickhouse/schema.sql has the tables.
#include "cli/fleet.h"

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "cli/parse.h"
#include "core/fleet.h"
#include "core/units.h"
#include "sink/clock.h"
#include "sink/record_reader.h"
#include "sink/stream.h"
#include "sink/text.h"
#include "source/clickhouse.h"

namespace finrace {

namespace {

using nlohmann::json;

constexpr std::uint64_t s_per_hour = 3600;
/// Numbers in one question: a store takes no question without end (max_query_size).
constexpr std::ptrdiff_t most_asked = 2000;
/// A host that has told nothing for so long, or so many intervals, has fallen silent: it tells of itself at each.
constexpr std::uint64_t silent_after_s = 600;
constexpr std::uint64_t most_missed = 3;
constexpr std::uint64_t ms_per_second = 1000;

/// Whose times are looked at, of verdicts that are alike: 80 MB of the store's memory.
constexpr std::uint64_t most_alike = 10'000'000;

/// What groups of verdicts have alike, and what they add up to.
constexpr std::string_view group_columns = R"(
    `upstream.address` AS address, `upstream.port` AS port, `host.name` AS host, `process.executable.name` AS process,
    if(startsWith(`upstream.address`, '127.') OR `upstream.address` = '::1', ifNull(`finrace.connection.netns`, 0), 0) AS netns,
    `finrace.cause` AS cause, `finrace.certainty` AS certainty, `finrace.reason` AS reason,
    ifNull(`finrace.incomplete`, 0) AS incomplete,
    ifNull(`finrace.outcome.client_answered`, 0) AS answered,
    if(ifNull(`finrace.outcome.client_answered`, 0) = 1, ifNull(`http.response.status_code`, 0), 0) AS status,
    `finrace.cause` IN ({races}) AS is_race,
    ifNull(`finrace.connection.reused`, 0) = 1 OR ifNull(`finrace.connection.idle_ms`, 0) >= {shortest_timer} AS rested)";

constexpr std::string_view group_sums = R"(
    count() AS verdicts,
    sum(multiIf(`finrace.cause` = 'accept_overflow', greatest(ifNull(`finrace.evidence.turned_away`, 1), 1),
                `finrace.cause` = 'upstream_benched', greatest(ifNull(`finrace.evidence.untried_answers`, 1), 1),
                1)) AS affected,
    countIf(ifNull(`finrace.outcome.retried`, 0) = 1 AND ifNull(`finrace.outcome.client_answered`, 0) = 1
            AND ifNull(`http.response.status_code`, 0) BETWEEN 1 AND 499) AS hidden,
    countIf(`finrace.outcome.client_address` != '' AND ifNull(`finrace.outcome.client_answered`, 0) = 0) AS clients_left,
    arraySlice({sorted}, 1, 5) AS times,
    max(at_ns) AS last_ns,
    arrayFilter((x, before) -> before = 0 OR x > before + {apart}, {sorted},
                arrayPushFront(arrayPopBack({sorted}), toUInt64(0))) AS begins,
    arrayFilter((x, after) -> after = 0 OR after > x + {apart}, {sorted},
                arrayPushBack(arrayPopFront({sorted}), toUInt64(0))) AS ends,
    groupArrayIf(16)(toUInt32(greatest(ifNull(`finrace.close.after_request_ms`, 0), 0)), NOT is_race) AS waits,
    groupArrayIf(16)(at_ns, NOT is_race) AS waits_at,
    toUInt32(min(greatest(ifNull(`finrace.close.after_request_ms`, 0), 0))) AS lowest_wait,
    toUInt32(max(greatest(ifNull(`finrace.close.after_request_ms`, 0), 0))) AS highest_wait,
    countIf(`finrace.close.after_request_ms` IS NULL) AS without_wait,
    min({rank}) AS rank, argMin(id, {rank}) AS instance)";

/// The lower, the more a verdict tells: whose client is known, then the first.
constexpr std::string_view rank_of = "(`finrace.outcome.client_address` = '') * 4611686018427387904 + at_ns";

std::string columns()
{
    std::string races;
    for (const Cause cause : race_causes)
        races += fmt::format("{}'{}'", races.empty() ? "" : ", ", to_string(cause));
    return fmt::format(group_columns, fmt::arg("races", races), fmt::arg("shortest_timer", shortest_idle_timer_ms));
}

std::string sums()
{
    return fmt::format(group_sums, fmt::arg("rank", rank_of), fmt::arg("apart", Finding::burst_apart_ns),
                       fmt::arg("sorted", fmt::format("arraySort(groupArray({})(at_ns))", most_alike)));
}

constexpr std::string_view group_keys = "address, port, netns, host, process, cause, certainty, reason, incomplete, "
                                        "answered, status, is_race, rested";

constexpr std::string_view both_ends = "`upstream.address`, `upstream.port`, `client.address`, `client.port`";

/// Each end's values in one order, whatever order the store has them in: what a close proves comes first.
std::string in_order(std::string_view values)
{
    constexpr std::string_view order = "groupArray(concat(if(`finrace.cause` = 'closed_on_request', '0', '1'), "
                                       "if(`finrace.certainty` = 'proven', '0', '1'), "
                                       "toString(id)))";
    return fmt::format("arraySort((value, place) -> place, groupArray({}), {})", values, order);
}

/// Clients' verdicts, each with what its upstream's own host says of the same connection: the byte that its process had
/// not read is one of the request's, or the one behind it. Sequence numbers go around (RFC 9293, 3.4).
std::string client_groups(std::uint64_t since_s)
{
    return fmt::format(
        R"(
SELECT {columns},
    arrayFirstIndex(number -> toUInt32(number - ifNull(`finrace.request.sequence_number`, 0))
                              <= ifNull(`finrace.request.bytes`, 0), server_numbers) AS found,
    `finrace.request.sequence_number` IS NULL OR found = 0 AS alone,
    if(alone, '', server_hosts[found]) AS server_host,
    if(alone, '', server_causes[found]) AS server_cause,
    if(alone, '', server_certainties[found]) AS server_certainty,
    if(alone, '', server_events[found]) AS server_event,
    NOT alone AND server_unread[found] >= ifNull(`finrace.request.bytes`, 0) AS server_whole,
    NOT alone AND server_signals[found] != 0 AS server_killed,
    {sums},
    argMin(if(alone, '', server_messages[found]), {rank}) AS server_message
FROM finrace.verdicts FINAL
ANY LEFT JOIN (
    SELECT {ends}, {numbers} AS server_numbers, {hosts} AS server_hosts, {causes} AS server_causes, {certainties} AS
           server_certainties, {events} AS server_events, {messages} AS server_messages, {unread} AS server_unread,
           {signals} AS server_signals
    FROM finrace.verdicts FINAL
    WHERE `finrace.side` = 'server' AND `finrace.request.sequence_number` IS NOT NULL AND at >= toDateTime({since})
    GROUP BY {ends}
) USING ({ends})
WHERE `finrace.side` = 'client' AND at >= toDateTime({since})
GROUP BY {keys}, found, alone, server_host, server_cause, server_certainty, server_event, server_whole, server_killed)",
        fmt::arg("columns", columns()), fmt::arg("sums", sums()), fmt::arg("rank", rank_of),
        fmt::arg("ends", both_ends), fmt::arg("keys", group_keys),
        fmt::arg("numbers", in_order("assumeNotNull(`finrace.request.sequence_number`)")),
        fmt::arg("hosts", in_order("`host.name`")), fmt::arg("causes", in_order("`finrace.cause`")),
        fmt::arg("certainties", in_order("`finrace.certainty`")),
        fmt::arg("events", in_order("`finrace.evidence.event`")), fmt::arg("messages", in_order("`finrace.message`")),
        fmt::arg("unread", in_order("ifNull(`finrace.evidence.unread_bytes`, 0)")),
        fmt::arg("signals", in_order("ifNull(`finrace.evidence.exit_signal`, 0)")), fmt::arg("since", since_s));
}

/// Servers' own verdicts: all of them, or those alone of which no client's host tells.
std::string server_groups(std::uint64_t since_s, bool alone)
{
    constexpr std::string_view with_clients = R"(
ANY LEFT JOIN (
    SELECT {ends}, groupArray(assumeNotNull(`finrace.request.sequence_number`)) AS client_numbers,
           groupArray(ifNull(`finrace.request.bytes`, 0)) AS client_bytes
    FROM finrace.verdicts FINAL
    WHERE `finrace.side` = 'client' AND `finrace.request.sequence_number` IS NOT NULL AND at >= toDateTime({since})
        AND ({ends}) IN (SELECT {ends} FROM finrace.verdicts WHERE `finrace.side` = 'server' AND at >= toDateTime({since}))
    GROUP BY {ends}
) USING ({ends}))";
    constexpr std::string_view without_client = R"(
    AND (`finrace.request.sequence_number` IS NULL
         OR NOT arrayExists((number, bytes) -> toUInt32(ifNull(`finrace.request.sequence_number`, 0) - number) <= bytes,
                            client_numbers, client_bytes)))";
    return fmt::format(
        R"(
SELECT {columns}, {sums}
FROM finrace.verdicts FINAL{join}
WHERE `finrace.side` = 'server' AND at >= toDateTime({since}){condition}
GROUP BY {keys})",
        fmt::arg("columns", columns()), fmt::arg("sums", sums()), fmt::arg("keys", group_keys),
        fmt::arg("join",
                 !alone ? "" : fmt::format(with_clients, fmt::arg("ends", both_ends), fmt::arg("since", since_s))),
        fmt::arg("condition", alone ? without_client : ""), fmt::arg("since", since_s));
}

constexpr std::string_view pool_key = "`network.peer.address`, `network.peer.port`, `finrace.upstream.netns`, "
                                      "`finrace.upstream.other`, `finrace.upstream.id`, `host.name`, `finrace.run`";

/// Each run's newest word on each of its upstreams.
std::string pools(std::uint64_t since_s)
{
    return fmt::format("SELECT * FROM finrace.upstream_hours WHERE hour >= toDateTime({}) "
                       "ORDER BY `finrace.sequence` DESC LIMIT 1 BY {}",
                       since_s, pool_key);
}

/// What these runs had counted before.
std::string pools_before(std::uint64_t since_s)
{
    return fmt::format(R"(
SELECT {key},
    argMax(`finrace.upstream.connections.closed`, `finrace.sequence`) AS `finrace.upstream.connections.closed`,
    argMax(`finrace.upstream.exchanges`, `finrace.sequence`) AS `finrace.upstream.exchanges`,
    argMax(`finrace.upstream.unclassified`, `finrace.sequence`) AS `finrace.upstream.unclassified`,
    argMax(`finrace.upstream.verdicts.keepalive_race`, `finrace.sequence`) AS `finrace.upstream.verdicts.keepalive_race`,
    argMax(`finrace.upstream.verdicts.stale_response`, `finrace.sequence`) AS `finrace.upstream.verdicts.stale_response`,
    argMax(`finrace.upstream.verdicts.stale_reuse`, `finrace.sequence`) AS `finrace.upstream.verdicts.stale_reuse`
FROM finrace.upstream_hours
WHERE hour < toDateTime({since})
    AND `finrace.run` GLOBAL IN (SELECT `finrace.run` FROM finrace.upstream_hours WHERE hour >= toDateTime({since}))
GROUP BY {key})",
                       fmt::arg("key", pool_key), fmt::arg("since", since_s));
}

/// What each run has lost, since and before, and when its host was heard last.
std::string health(std::uint64_t since_s)
{
    const auto lost = [&](std::string_view when) {
        return fmt::format("maxIf(`finrace.health.losses.ring_full` + `finrace.health.losses.table_full` + "
                           "`finrace.health.losses.unreadable` + `finrace.health.losses.program_skipped` + "
                           "`finrace.output.dropped`, hour {} toDateTime({}))",
                           when, since_s);
    };
    return fmt::format(
        "SELECT `host.name` AS host, `finrace.run` AS run, {} AS lost, {} AS lost_before, "
        "max(hour) >= toDateTime({}) AS is_within, "
        "argMax(`finrace.health.last`, `finrace.sequence`) AS ended, "
        "argMax(`finrace.health.hooks_missing`, `finrace.sequence`) AS hooks_missing, "
        "argMax(`finrace.health.backend`, `finrace.sequence`) AS backend, "
        "argMax(`finrace.health.interval_ms`, `finrace.sequence`) AS interval_ms, toUnixTimestamp(now()) AS now_s, "
        "toUnixTimestamp(max(toDateTime(replaceOne(substring(timestamp, 1, 19), 'T', ' '), 'UTC'))) AS last_s "
        "FROM finrace.health_hours GROUP BY host, run HAVING is_within",
        lost(">="), lost("<"), since_s);
}

class FleetReader {
public:
    FleetReader(const ClickHouse& store, const Filter& filter, std::uint64_t since_s)
        : store_(store), filter_(filter), since_s_(since_s)
    {
    }

    void read_verdicts()
    {
        if (filter_.side != Side::server)
            each(client_groups(since_s_), [this](const json& row) { add_group(row, false); });
        // What the filter keeps of the clients' verdicts must not hide the servers'.
        const bool both = filter_.side != Side::server && filter_.processes.empty();
        if (filter_.side != Side::client)
            each(server_groups(since_s_, both), [this](const json& row) { add_group(row, true); });
        const std::vector<std::uint64_t> instances = fleet_.instances();
        for (auto from = instances.begin(); from != instances.end();) {
            const auto to = from + std::min(most_asked, instances.end() - from);
            each(fmt::format("SELECT * FROM finrace.verdicts WHERE at >= toDateTime({}) AND id IN ({}) LIMIT 1 BY id",
                             since_s_, fmt::join(from, to, ", ")),
                 [this](const json& row) { add_instance(row); });
            from = to;
        }
    }

    void read_pools()
    {
        if (filter_.side == Side::server)
            return;
        std::map<PoolId, json> before;
        each(pools_before(since_s_), [&](const json& row) { before.emplace(id_of(row), row); });
        each(pools(since_s_), [&](const json& row) {
            const auto found = before.find(id_of(row));
            add_pool(row, found != before.end() ? found->second : json::object());
        });
        for (auto& [place, known] : pools_) {
            if (is_newest(place, known))
                continue;
            known.pool.exposure = {};
            known.pool.hosts[place.host] = PoolState::unknown;
            if (KnownPool* newer = newest_of(place)) {
                add_counts(newer->pool, known.pool);
                known.replaced = true;
            }
        }
        for (auto& [place, known] : pools_)
            if (!known.replaced)
                fleet_.add(std::move(known.pool));
    }

    /// Whether any host has told anything at all, by this filter or another.
    void read_health(Watched& watched)
    {
        struct Heard {
            std::uint64_t at_s = 0;
            bool is_silent = false;
            bool has_ended = false;
            std::uint64_t hooks_missing = 0;
        };
        std::map<std::string, Heard> heard; // last, of each host
        each(health(since_s_), [&](const json& row) {
            const FlatRecord record(row);
            const std::uint64_t before = record.number("lost_before");
            watched.lost += record.number("lost") - std::min(record.number("lost"), before);
            const std::uint64_t last_s = record.number("last_s");
            const std::uint64_t patience_s =
                std::max(silent_after_s, most_missed * record.number("interval_ms") / ms_per_second);
            watched.tells_outcomes |= record.text("backend") != "cgroup";
            if (Heard& host = heard[record.text("host")]; host.at_s <= last_s)
                host = {.at_s = last_s,
                        .is_silent = last_s + patience_s < record.number("now_s"),
                        .has_ended = record.truth("ended"),
                        .hooks_missing = record.number("hooks_missing")};
        });
        watched.tells_outcomes |= heard.empty();
        watched.fleet.emplace();
        for (const auto& [host, last] : heard) {
            watched.fleet->hosts.push_back(printable(host));
            watched.missing_hooks = std::max(watched.missing_hooks, last.hooks_missing);
            if (last.is_silent)
                (last.has_ended ? watched.fleet->ended : watched.fleet->silent).push_back(printable(host));
        }
    }

    [[nodiscard]] Diagnosis diagnosis() { return std::move(fleet_).diagnosis(); }

private:
    using PoolId = std::tuple<std::string, std::uint64_t, std::uint64_t, bool, std::string, std::string, std::string>;

    /// An upstream, a host, and which of the upstreams it is that have one masked address.
    struct PoolPlace {
        UpstreamKey where;
        std::string host;
        std::string id;

        auto
        operator<=>(const PoolPlace&) const = default; // NOLINT(modernize-use-nullptr): the 0 is the compiler's own
    };
    struct KnownPool {
        std::string newest; ///< when the newest word on it was told
        std::string run;    ///< by which run
        Pool pool;
        bool replaced = false; ///< another one has its counts
    };

    static PoolId id_of(const json& row)
    {
        const FlatRecord record(row);
        return {record.text("network.peer.address"),
                record.number("network.peer.port"),
                record.number("finrace.upstream.netns"),
                record.truth("finrace.upstream.other"),
                record.text("finrace.upstream.id"),
                record.text("host.name"),
                record.text("finrace.run")};
    }

    void each(const std::string& sql, const std::function<void(const json&)>& take) const
    {
        store_.query(sql, [&](std::string_view line) {
            const json row = json::parse(line, nullptr, false);
            if (!row.is_object())
                throw StoreError(fmt::format("{}: a row that is no JSON: {}", store_.name(), line.substr(0, 100)));
            take(row);
        });
    }

    /// Nothing of what the filter does not choose. Each host's network namespaces have loopbacks of their own.
    std::optional<UpstreamKey> chosen(const std::string& address, std::uint64_t port, const std::string& host,
                                      std::uint64_t netns, const std::string& process)
    {
        std::optional<UpstreamKey> key = upstream_key(address, port);
        if (!key || !filter_.chooses(*key))
            return std::nullopt;
        const auto& processes = filter_.processes;
        if (!processes.empty() && std::none_of(processes.begin(), processes.end(),
                                               [&](const ProcessPattern& pattern) { return pattern.name == process; }))
            return std::nullopt;
        if (key->is_loopback())
            key->netns =
                static_cast<std::uint32_t>(networks_.try_emplace({host, netns}, networks_.size() + 1).first->second);
        return key;
    }

    void add_group(const json& row, bool server_side)
    {
        const FlatRecord record(row);
        FleetGroup group;
        group.host = printable(record.text("host"));
        group.process = record.text("process");
        const auto where =
            chosen(record.text("address"), record.number("port"), group.host, record.number("netns"), group.process);
        const auto cause = cause_from_string(record.text("cause"));
        const auto certainty = certainty_from_string(record.text("certainty"));
        if (!where || !cause || !certainty)
            return;
        group.where = *where;
        group.server_side = server_side;
        group.cause = *cause;
        group.certainty = *certainty;
        group.incomplete = record.truth("incomplete");
        group.rested = record.truth("rested");
        group.reason = reason_from_string(record.text("reason"));
        group.status = static_cast<std::uint16_t>(record.number("status"));
        group.verdicts = record.number("verdicts");
        group.affected = record.number("affected");
        group.hidden = record.number("hidden");
        group.clients_left = record.number("clients_left");
        group.times_ns = row.at("times").get<std::vector<std::uint64_t>>();
        group.last_ns = record.number("last_ns");
        group.instance = record.number("instance");
        group.rank = record.number("rank");
        const auto begins = row.at("begins").get<std::vector<std::uint64_t>>();
        const auto ends = row.at("ends").get<std::vector<std::uint64_t>>();
        for (std::size_t i = 0; i < std::min(begins.size(), ends.size()); ++i)
            group.bursts.emplace_back(begins[i], ends[i]);
        if (!server_side && !is_race(*cause) && record.number("without_wait") == 0) {
            const auto waits = row.at("waits").get<std::vector<std::uint32_t>>();
            const auto at = row.at("waits_at").get<std::vector<std::uint64_t>>();
            for (std::size_t i = 0; i < std::min(waits.size(), at.size()); ++i)
                group.waits_ms.emplace_back(waits[i], at[i]);
            group.lowest_wait_ms = static_cast<std::uint32_t>(record.number("lowest_wait"));
            group.highest_wait_ms = static_cast<std::uint32_t>(record.number("highest_wait"));
        }
        if (const auto says = cause_from_string(record.text("server_cause"))) {
            group.server_message = record.text("server_message");
            group.server = ServerSays{.host = printable(record.text("server_host")),
                                      .cause = *says,
                                      .late = record.text("server_event") == "segment_after_close",
                                      .proven = record.text("server_certainty") == to_string(Certainty::proven),
                                      .whole = record.truth("server_whole"),
                                      .reset = record.text("server_event") == "closed",
                                      .killed = record.truth("server_killed")};
        }
        fleet_.add(std::move(group));
    }

    void add_instance(const json& row)
    {
        const FlatRecord record(row);
        const event e = event_of(record, record.number("at_ns"));
        if (auto verdict = verdict_of(record))
            fleet_.instance(record.number("id"), {.e = e,
                                                  .last = e,
                                                  .verdict = std::move(*verdict),
                                                  .outcome = outcome_of(record),
                                                  .process = record.text("process.executable.name"),
                                                  .clock_offset_ns = 0});
    }

    void add_pool(const json& row, const json& row_before)
    {
        const FlatRecord record(row);
        const FlatRecord before(row_before);
        const std::string host = printable(record.text("host.name"));
        const std::string process = record.text("finrace.upstream.process");
        const bool other = record.truth("finrace.upstream.other");
        if (other && !(filter_.upstreams.empty() && filter_.processes.empty()))
            return;
        const auto where = other ? std::optional(UpstreamKey{})
                                 : chosen(record.text("network.peer.address"), record.number("network.peer.port"), host,
                                          record.number("finrace.upstream.netns"), process);
        if (!where)
            return;
        const auto counted = [&](const char* name) {
            return record.number(name) - std::min(record.number(name), before.number(name));
        };
        Pool pool;
        pool.where = *where;
        pool.other = other;
        pool.process = process;
        pool.connections = counted("finrace.upstream.connections.closed");
        pool.requests = counted("finrace.upstream.exchanges");
        pool.unclassified = counted("finrace.upstream.unclassified");
        for (const Cause cause : race_causes)
            pool.races += counted(fmt::format("finrace.upstream.verdicts.{}", to_string(cause)).c_str());
        Upstream& upstream = pool.upstream;
        upstream.longest_reused_idle_ms =
            static_cast<std::uint32_t>(record.number("finrace.upstream.longest_reused_idle_ms"));
        const auto learned = [&](const char* ms, const char* spread, const char* samples) {
            const auto middle = static_cast<std::uint32_t>(record.number(ms));
            const auto width = static_cast<std::uint32_t>(record.number(spread));
            const std::uint32_t low = middle - std::min(middle, width / 2);
            return !record.has(ms) ? IdleTimeoutLearner()
                                   : IdleTimeoutLearner(IdleTimeout{
                                         .ms = middle,
                                         .lowest_ms = low,
                                         .highest_ms = low + width,
                                         .samples = static_cast<std::uint32_t>(record.number(samples)),
                                     });
        };
        upstream.idle_timeout =
            learned("finrace.upstream.idle_timeout_ms", "finrace.upstream.spread_ms", "finrace.upstream.samples");
        upstream.own_idle_limit =
            learned("finrace.upstream.own_idle_limit.ms", "finrace.upstream.own_idle_limit.spread_ms",
                    "finrace.upstream.own_idle_limit.samples");
        Exposure& exposure = pool.exposure;
        exposure.state =
            pool_state_from_string(record.text("finrace.upstream.exposure.state")).value_or(PoolState::unknown);
        exposure.window_ms = record.real("finrace.upstream.exposure.window_ms");
        exposure.late_reuses = record.real("finrace.upstream.exposure.late_reuses");
        exposure.races_a_day = record.real("finrace.upstream.exposure.races_a_day");
        exposure.share = record.real("finrace.upstream.exposure.share");
        exposure.told_by = record.real("finrace.upstream.exposure.told_by");
        pool.hosts[host] = exposure.state;
        keep({*where, host, record.text("finrace.upstream.id")},
             {.newest = record.text("timestamp"), .run = record.text("finrace.run"), .pool = std::move(pool)});
    }

    /// Of one host's runs all that they have counted, and how the newest one sees it.
    void keep(const PoolPlace& place, KnownPool told)
    {
        auto& newest_run = newest_runs_[{place.where, place.host}];
        newest_run = std::max(newest_run, {told.newest, told.run});
        const auto [found, fresh] = pools_.try_emplace(place, told);
        if (fresh)
            return;
        KnownPool& known = found->second;
        if (told.newest > known.newest)
            std::swap(told, known);
        add_counts(known.pool, told.pool);
    }

    /// Which of a masked network's upstreams it is, another run tells by another id: of an older one there are counts,
    /// and how its pool stands is what the newest says of that network.
    [[nodiscard]] bool is_newest(const PoolPlace& place, const KnownPool& known) const
    {
        return place.id.empty() || known.run == newest_runs_.at({place.where, place.host}).second;
    }

    KnownPool* newest_of(const PoolPlace& old)
    {
        for (auto one = pools_.lower_bound({old.where, old.host, {}}); one != pools_.end(); ++one) {
            auto& [place, known] = *one;
            if (place.where != old.where || place.host != old.host)
                break;
            if (is_newest(place, known))
                return &known;
        }
        return nullptr;
    }

    static void add_counts(Pool& to, const Pool& more)
    {
        to.connections += more.connections;
        to.requests += more.requests;
        to.races += more.races;
        to.unclassified += more.unclassified;
    }

    const ClickHouse& store_;
    const Filter& filter_;
    std::uint64_t since_s_;
    Fleet fleet_;
    std::map<std::pair<std::string, std::uint64_t>, std::size_t> networks_; ///< numbers that stand for loopbacks
    std::map<PoolPlace, KnownPool> pools_;
    /// That told of that network, by host: when it was heard, and which. One that has just begun has not told of all.
    std::map<std::pair<UpstreamKey, std::string>, std::pair<std::string, std::string>> newest_runs_;
};

void check_filter(const Filter& filter)
{
    for (const ProcessPattern& pattern : filter.processes)
        if (pattern.pid)
            throw UsageError(
                fmt::format("--process {}: over many hosts a number names no process; accepted: a name", *pattern.pid));
}

} // namespace

FleetReport ask_fleet(const std::string& url, std::chrono::nanoseconds since, const Filter& filter)
{
    check_filter(filter);
    let_writes_fail(); // also to a store that goes away
    try {
        const ClickHouse store(url);
        const auto now_s = static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
                .count());
        const auto ago_s = static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::seconds>(since).count());
        // Upstreams are known as they stood at the end of each hour.
        const std::uint64_t since_s = (now_s - std::min(now_s, ago_s)) / s_per_hour * s_per_hour;
        FleetReader reader(store, filter, since_s);
        FleetReport report;
        reader.read_health(report.watched);
        reader.read_verdicts();
        reader.read_pools();
        report.diagnosis = reader.diagnosis();
        report.watched.source =
            printable(fmt::format("{} in {}, since {}", counted(report.watched.fleet->hosts.size(), "host"),
                                  store.name(), WallClock(0).day_and_time(since_s * ns_per_second)));
        report.watched.observed_ns = (now_s - since_s) * ns_per_second;
        report.watched.filter = filter.flags;
        report.watched.server_side_only = filter.side == Side::server;
        return report;
    } catch (const StoreError& error) {
        throw UsageError(fmt::format("--clickhouse: {}", error.what()));
    } catch (const json::exception& error) {
        throw UsageError(fmt::format("--clickhouse: an answer in another form than was asked for: {}", error.what()));
    }
}

} // namespace finrace
