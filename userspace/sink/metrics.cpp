// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/metrics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include "core/classify.h"
#include "core/software.h"
#include "sink/facts.h"
#include "sink/text.h"

namespace finrace {

namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Label = ClientMetric::Label;

constexpr double milliseconds_a_second = 1000;
/// Sets of an upstream's labels, from which on outcomes are not told apart.
constexpr std::size_t most_told_apart = 40;
/// In seconds: around the timers that servers have by default (1, 2, 5, 15, 20, 60, 65, 75, 115 s).
constexpr std::array idle_bounds{0.1,  0.5,  1.0,  2.0,  3.0,  5.0,   7.5,   10.0,
                                 15.0, 20.0, 30.0, 60.0, 75.0, 120.0, 300.0, 900.0};

/// Families in the order in which they were first named.
class Families {
public:
    void counter(const char* name, const char* help, std::vector<Label> labels, double value)
    {
        ClientMetric metric;
        metric.label = std::move(labels);
        metric.counter.value = value;
        add(name, help, MetricType::Counter, std::move(metric));
    }
    void gauge(const char* name, const char* help, std::vector<Label> labels, double value)
    {
        ClientMetric metric;
        metric.label = std::move(labels);
        metric.gauge.value = value;
        add(name, help, MetricType::Gauge, std::move(metric));
    }
    void histogram(const char* name, const char* help, std::vector<Label> labels, ClientMetric::Histogram histogram)
    {
        ClientMetric metric;
        metric.label = std::move(labels);
        metric.histogram = std::move(histogram);
        add(name, help, MetricType::Histogram, std::move(metric));
    }

    [[nodiscard]] std::string text() const { return prometheus::TextSerializer().Serializer::Serialize(families_); }

private:
    void add(const char* name, const char* help, MetricType type, ClientMetric metric)
    {
        const auto [found, fresh] = places_.emplace(name, families_.size());
        if (fresh)
            families_.push_back({name, help, type, {}});
        families_[found->second].metric.push_back(std::move(metric));
    }

    std::vector<MetricFamily> families_;
    std::map<std::string_view, std::size_t> places_;
};

double number(std::uint64_t count)
{
    return static_cast<double>(count);
}

double seconds(std::chrono::nanoseconds time)
{
    return std::chrono::duration<double>(time).count();
}

std::vector<Label> with(std::vector<Label> labels, std::initializer_list<Label> more)
{
    labels.insert(labels.end(), more);
    return labels;
}

/// What a client got: those that proxies and servers make themselves by their number, others by their class. A number
/// of series that no server can choose.
std::string status_text(const Outcome& outcome)
{
    constexpr std::array told{400, 408, 413, 429, 499, 500, 502, 503, 504};
    if (!outcome.client)
        return "unknown";
    if (!outcome.client->answered)
        return "none";
    const int status = outcome.client->status;
    if (status == 0)
        return "unknown";
    if (std::find(told.begin(), told.end(), status) != told.end())
        return std::to_string(status);
    return status >= 100 && status < 600 ? fmt::format("{}xx", status / 100) : "unknown";
}

std::string retried_text(const Outcome& outcome)
{
    if (outcome.retry)
        return "yes";
    return outcome.known ? "no" : "unknown";
}

ClientMetric::Histogram rests_of(const RestHistogram& rests)
{
    ClientMetric::Histogram histogram;
    histogram.sample_count = rests.count();
    std::size_t next = 0;
    const std::vector<RestHistogram::Bucket> filled = rests.filled();
    std::uint64_t below = 0;
    for (const double bound : idle_bounds) {
        // One that a bound lies within counts above it: where it belongs, its middle being above as a rule.
        while (next < filled.size() && number(filled[next].to_ms) <= bound * milliseconds_a_second)
            below += filled[next++].count;
        histogram.bucket.push_back({below, bound});
    }
    histogram.bucket.push_back({rests.count(), std::numeric_limits<double>::infinity()});
    for (const RestHistogram::Bucket& bucket : filled)
        histogram.sample_sum +=
            bucket.count * (number(bucket.from_ms) + number(bucket.to_ms)) / 2 / milliseconds_a_second;
    return histogram;
}

void add_exposed(Families& families, const std::vector<Label>& labels, bool exposed)
{
    families.gauge("finrace_upstream_exposed",
                   "1 if the upstream closes connections that this host would use again: a request will meet that.",
                   labels, exposed ? 1 : 0);
}

/// A day, of a pool that is exposed.
std::optional<Exposure::Range> races_to_come(const Exposure& exposure)
{
    const std::optional<Exposure::Expected> expected = exposure.expected();
    return expected && exposure.state == PoolState::exposed ? std::optional(expected->races_a_day) : std::nullopt;
}

void add_races_to_come(Families& families, const std::vector<Label>& labels, const Exposure::Range& races)
{
    for (const auto& [bound, value] : {std::pair("low", races.low), std::pair("high", races.high)})
        families.gauge("finrace_upstream_expected_races_per_day",
                       "Races to be expected in a day like what was seen, at least (low) and at most (high).",
                       with(labels, {{"bound", bound}}), value);
}

/// What can't be added up: of an upstream that has series of its own.
void add_own(Families& families, const std::vector<Label>& labels, const Upstream& upstream, const Exposure& exposure)
{
    if (const std::optional<IdleTimeout> timeout = upstream.idle_timeout.timeout()) {
        families.gauge("finrace_upstream_idle_timeout_seconds",
                       "The upstream's idle timeout, as its closes teach it, or as you told it.", labels,
                       timeout->ms / milliseconds_a_second);
        families.gauge("finrace_upstream_idle_timeout_samples", "Idle closes that it is learned from; 0: it was told.",
                       labels, timeout->samples);
    }
    if (const std::optional<IdleTimeout> own = upstream.own_idle_limit.timeout())
        families.gauge("finrace_upstream_own_idle_limit_seconds",
                       "After so long this host closes its idle connections.", labels, own->ms / milliseconds_a_second);
    families.gauge("finrace_upstream_longest_reused_idle_seconds",
                   "This host used a connection again after as much rest as this.", labels,
                   upstream.longest_reused_idle_ms / milliseconds_a_second);
    add_exposed(families, labels, exposure.state == PoolState::exposed);
    if (const std::optional<Exposure::Range> races = races_to_come(exposure))
        add_races_to_come(families, labels, *races);
    families.histogram(
        "finrace_upstream_longest_idle_seconds",
        "Of each reused connection that has ended the longest rest before a request; the sum is reckoned "
        "from the buckets' middles.",
        labels, rests_of(upstream.rests));
}

void add_counts(Families& families, const std::vector<Label>& labels, const Upstream& upstream)
{
    const UpstreamCounts& counts = upstream.counts;
    families.counter("finrace_upstream_unclassified_total", "Failed exchanges that no cause was found for.", labels,
                     number(counts.unclassified));
    families.counter("finrace_upstream_connections_opened_total", "Connections that were opened to it.", labels,
                     number(counts.opened));
    families.counter("finrace_upstream_connections_failed_total", "Connections that could not be opened.", labels,
                     number(counts.open_failed));
    families.counter("finrace_upstream_connections_closed_total", "Connections that have ended.", labels,
                     number(counts.closed));
    families.counter("finrace_upstream_connections_reused_total",
                     "Connections that have ended and had carried more than one request.", labels,
                     number(upstream.rests.count()));
    families.counter("finrace_upstream_exchanges_total", "Requests, of the connections that have ended.", labels,
                     number(counts.exchanges));
    const char* help = "Idle connections that were closed, and harmed nothing, by which end.";
    families.counter("finrace_upstream_idle_closes_total", help, with(labels, {{"by", "peer"}}),
                     number(counts.idle_closes_by_peer));
    families.counter("finrace_upstream_idle_closes_total", help, with(labels, {{"by", "local"}}),
                     number(counts.idle_closes_by_local));
}

void add_run(Families& families, const Health& health)
{
    families.gauge("finrace_build_info", "1; what runs.", {{"version", health.version}}, 1);
    families.gauge("finrace_backend_info", "1; how the kernel is watched.",
                   {{"backend", health.backend}, {"attach", health.attach}}, 1);
    families.gauge("finrace_missing_hooks", "Places in the kernel that it could not attach to.", {},
                   number(health.missing_hooks.size()));
    for (const MissingHook& hook : health.missing_hooks)
        families.gauge("finrace_missing_hook_info", "1; a place that it could not attach to.", {{"hook", hook.name}},
                       1);
    families.counter("finrace_connections_followed_total",
                     "Connections opened, accepted and adopted; those of losses at table_full are not followed.", {},
                     number(health.connections_begun));
    families.counter("finrace_connections_adopted_total", "Of these, those older than itself.", {},
                     number(health.connections_adopted));
    families.counter("finrace_events_total", "Events that the kernel handed on.", {}, number(health.events));
    for (unsigned place = 0; place < LOSS_PLACES; ++place)
        families.counter("finrace_lost_total", "Events and connections that were lost, by place.",
                         {{"place", std::string(loss_name(place))}}, number(health.losses.by_place[place]));
    const auto add_output = [&families](const OutputState& output) {
        const std::vector<Label> labels{{"output", printable(output.name)}};
        families.counter("finrace_output_records_written_total",
                         "Records that an output has taken; of a recording lines.", labels, number(output.written));
        families.counter("finrace_output_records_dropped_total", "Records that it did not take in time.", labels,
                         number(output.dropped));
        families.gauge("finrace_output_waiting_bytes", "Waiting for it to take them.", labels,
                       number(output.bytes_waiting));
        families.gauge("finrace_output_failing",
                       "1 while it takes nothing: no room, nobody there; or its file could not be opened anew.", labels,
                       output.problem != 0 ? 1 : 0);
    };
    std::for_each(health.outputs.begin(), health.outputs.end(), add_output);
    std::for_each(health.beside.begin(), health.beside.end(), add_output);
}

void add_costs(Families& families, const Standing& standing)
{
    families.counter("process_cpu_seconds_total", "User and system time of this process.", {},
                     seconds(standing.process.processor));
    families.gauge("process_resident_memory_bytes", "Resident memory of this process.", {},
                   number(standing.process.resident_bytes));
    families.gauge("process_start_time_seconds", "When this process started, since the epoch.", {},
                   standing.process.started_s);
    for (const ProgramUse& program : standing.programs) {
        families.counter("finrace_bpf_runs_total",
                         "Runs of a BPF program; counted while kernel.bpf_stats_enabled is 1.",
                         {{"program", program.name}}, number(program.runs));
        families.counter("finrace_bpf_run_seconds_total", "Time in a BPF program; counted likewise.",
                         {{"program", program.name}}, seconds(program.time));
    }
}

} // namespace

Metrics::Slot& Metrics::slot_of(const UpstreamKey& key, std::uint64_t now_ns)
{
    auto found = slots_.find(key);
    if (found == slots_.end() && slots_.size() >= most_upstreams_) {
        // One alone, and for what is newer alone: a scrape asks for all, and who left would come back with nothing.
        const auto oldest = std::min_element(slots_.begin(), slots_.end(), [](const auto& one, const auto& other) {
            return one.second.newest_ns < other.second.newest_ns;
        });
        if (oldest != slots_.end() && oldest->second.newest_ns + Upstreams::forgotten_after_ns < now_ns)
            slots_.erase(oldest);
    }
    if (found == slots_.end() && slots_.size() < most_upstreams_)
        found = slots_.emplace(key, Slot{}).first;
    if (found == slots_.end())
        return other_;
    found->second.newest_ns = std::max(found->second.newest_ns, now_ns);
    return found->second;
}

void Metrics::count(const Judged& judged)
{
    const Verdict& verdict = *judged.classification.verdict;
    const auto labels = [&](std::string retried, std::string status) {
        return Labels{verdict.cause,      verdict.variant,
                      verdict.certainty,  is_client(judged.e) ? "client" : "server",
                      std::move(retried), std::move(status)};
    };
    std::map<Labels, std::uint64_t>& verdicts =
        slot_of(UpstreamKey::judged_at(judged.e), judged.e.timestamp_ns).verdicts;
    const Labels whole = labels(retried_text(judged.outcome), status_text(judged.outcome));
    // What a client got is chosen by those whose traffic this is: it must not take all of a scrape's room.
    const bool is_told_apart = verdicts.size() < most_told_apart || verdicts.contains(whole);
    ++verdicts[is_told_apart ? whole : labels("other", "other")];
}

std::string Metrics::text(const Standing& standing)
{
    Families families;
    add_run(families, standing.health);
    const std::vector<Label> others{{"upstream", "other"}};
    const auto own_labels = [this](const UpstreamKey& key) {
        const UpstreamLabel label = label_of_(key);
        std::vector<Label> labels{{"upstream", with_port(label.address, key.port)}};
        if (key.netns != 0)
            labels.push_back({"netns", std::to_string(key.netns)});
        if (!label.name.empty())
            labels.push_back({"name", label.name});
        return labels;
    };

    // What depends on how long connections have been open is not told where that is not known.
    const OpenConnections unknown_open{.count = 1, .longest_ns = std::numeric_limits<std::uint64_t>::max()};
    const auto run_ns = static_cast<std::uint64_t>(standing.health.uptime.count());
    bool others_exposed = false;
    Exposure::Range others_to_come{};
    standing.upstreams.for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        if (key == nullptr)
            return;
        const Exposure exposure = exposure_of(upstream, upstream.watched_ns(run_ns, standing.now_ns),
                                              standing.open ? standing.open(*key) : unknown_open, Ends{});
        if (&slot_of(*key, upstream.newest_ns) == &other_) {
            const Exposure::Range races = races_to_come(exposure).value_or(Exposure::Range{});
            others_exposed = others_exposed || exposure.state == PoolState::exposed;
            others_to_come.low += races.low;
            others_to_come.high += races.high;
            return;
        }
        const std::vector<Label> labels = own_labels(*key);
        add_counts(families, labels, upstream);
        add_own(families, labels, upstream, exposure);
    });
    if (others_exposed) {
        add_exposed(families, others, true);
        add_races_to_come(families, others, others_to_come);
    }

    // Both are there from the start, at 0: a counter that begins with its first race does not increase by it.
    std::uint64_t races = 0;
    for (const Cause cause : race_causes)
        if (const auto found = standing.health.verdicts.find(cause); found != standing.health.verdicts.end())
            races += found->second;
    families.counter("finrace_races_total", "Requests that met an upstream's idle close.", {}, number(races));
    const auto add_races = [&](const std::vector<Label>& of_upstream, const Slot& slot) {
        std::uint64_t own = 0;
        for (const auto& [labels, count] : slot.verdicts)
            own += is_race(std::get<Cause>(labels)) ? count : 0;
        families.counter("finrace_upstream_races_total", "Requests that met the upstream's idle close.", of_upstream,
                         number(own));
    };
    for (const auto& [key, slot] : slots_)
        add_races(own_labels(key), slot);
    add_races(others, other_);

    const auto add_verdicts = [&](const std::vector<Label>& of_upstream, const Slot& slot) {
        for (const auto& [labels, count] : slot.verdicts) {
            const auto& [cause, variant, certainty, side, retried, status] = labels;
            families.counter("finrace_verdicts_total", "Failed exchanges, by what was found about them.",
                             with(of_upstream, {{"cause", std::string(to_string(cause))},
                                                {"variant", std::string(to_string(variant))},
                                                {"certainty", std::string(to_string(certainty))},
                                                {"side", side},
                                                {"retried", retried},
                                                {"client_status", status}}),
                             number(count));
        }
    };
    for (const auto& [key, slot] : slots_)
        add_verdicts(own_labels(key), slot);
    add_verdicts(others, other_);
    add_costs(families, standing);
    return families.text();
}

} // namespace finrace
