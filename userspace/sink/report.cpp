// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/report.h"

#include <algorithm>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/advice.h"
#include "sink/facts.h"
#include "sink/timeline.h"

namespace finrace {

namespace {

using Json = nlohmann::ordered_json;

constexpr int report_schema = 1;
constexpr std::size_t most_pools = 20; ///< on a page for people

std::string endpoint(const UpstreamKey& key)
{
    return endpoint_text(key.address.data(), key.port, key.family);
}

std::string counted(std::uint64_t count, std::string_view one, std::string_view many = {})
{
    return fmt::format("{} {}", count,
                       count == 1     ? std::string(one)
                       : many.empty() ? fmt::format("{}s", one)
                                      : std::string(many));
}

std::string duration_text(std::uint64_t ms)
{
    if (ms < 1000)
        return fmt::format("{} ms", ms);
    if (ms < 600'000)
        return fmt::format("{:.2f} s", static_cast<double>(ms) / 1e3);
    return fmt::format("{:.0f} min", static_cast<double>(ms) / 60e3);
}

std::string rate_text(double races_a_day)
{
    return races_a_day < 0.1 ? "less than one in ten days"
                             : fmt::format("about {:.{}f} a day", races_a_day, races_a_day < 10 ? 1 : 0);
}

class Page {
public:
    Page(const Paint& paint, std::size_t width) : paint_(paint), width_(width) {}

    void line(std::string_view text = {}) { text_ += fmt::format("{}\n", text); }
    void head(std::string_view text) { line(paint_.bold(text)); }
    void paragraph(std::string_view text, std::size_t indent)
    {
        for (const std::string& one : wrap(text, width_ > indent ? width_ - indent : 1))
            line(fmt::format("{:{}}{}", "", indent, one));
    }
    void add(std::string_view lines, std::size_t indent)
    {
        while (!lines.empty()) {
            const std::size_t end = std::min(lines.find('\n'), lines.size());
            if (end > 0)
                line(fmt::format("{:{}}{}", "", indent, lines.substr(0, end)));
            lines.remove_prefix(std::min(end + 1, lines.size()));
        }
    }

    [[nodiscard]] const Paint& paint() const { return paint_; }
    [[nodiscard]] std::size_t width() const { return width_; }
    [[nodiscard]] std::string take() { return std::move(text_); }

private:
    const Paint& paint_;
    std::size_t width_;
    std::string text_;
};

std::string clients_text(const Finding& finding, bool tells_outcomes)
{
    if (!tells_outcomes)
        return "What clients got is not known: backend cgroup does not see it.";
    std::vector<std::string> parts;
    std::uint64_t known = finding.clients_left;
    for (const auto& [status, count] : finding.answers) {
        parts.push_back(fmt::format("{} × {}", count, status));
        known += count;
    }
    if (finding.clients_left > 0)
        parts.push_back(fmt::format("{} closed on without an answer, or gone", finding.clients_left));
    if (known < finding.count)
        parts.push_back(fmt::format("{} not known", finding.count - known));
    return fmt::format("Clients got: {}.{}", fmt::join(parts, ", "),
                       finding.hidden > 0 ? fmt::format(" A retry hid {}.", finding.hidden) : "");
}

std::string why_text(const Finding& finding)
{
    std::vector<std::string> parts;
    for (const auto& [certainty, count] : finding.certainties)
        parts.push_back(fmt::format("{} {}", count, to_string(certainty)));
    std::string text = fmt::format("{}: {}", text_of(finding.cause).title, fmt::join(parts, ", "));
    parts.clear();
    for (const auto& [reason, count] : finding.reasons)
        parts.push_back(fmt::format("{} {}", count, to_string(reason)));
    if (!parts.empty())
        text += fmt::format(". Why the upstream closed: {}", fmt::join(parts, ", "));
    return text + ".";
}

std::uint64_t races_of(const Pool& pool)
{
    std::uint64_t races = 0;
    for (const auto& [cause, count] : pool.upstream.counts.verdicts)
        races += is_race(cause) ? count : 0;
    return races;
}

const Pool* pool_of(const Diagnosis& diagnosis, const Finding& finding)
{
    const std::vector<const Pool*> pools = diagnosis.pools();
    const auto found = std::find_if(pools.begin(), pools.end(), [&](const Pool* pool) {
        return !pool->other && !finding.server_side && pool->where == finding.where;
    });
    return found != pools.end() ? *found : nullptr;
}

void add_remedies(Page& page, const Pool& pool, std::size_t indent)
{
    const std::optional<IdleTimeout> timeout = pool.upstream.idle_timeout.timeout();
    if (!timeout)
        return;
    const auto ways = remedies(*timeout, pool.upstream.own_idle_limit.timeout(), pool.process);
    for (const Remedy& way : ways) {
        const bool raise = way.end == Remedy::End::upstream;
        if (way.settings.empty()) {
            page.paragraph(fmt::format("{}: {}.", raise ? "The upstream" : "The proxy", way.why), indent);
            continue;
        }
        page.paragraph(
            fmt::format("{} ({}):", raise ? "Raise the upstream's idle timeout" : "Or let the proxy close first",
                        way.why),
            indent);
        for (const std::string& setting : way.settings)
            page.line(fmt::format("{:{}}{}", "", indent + 2, page.paint().bold(setting)));
    }
}

std::string timeout_text(const Pool& pool)
{
    const std::optional<IdleTimeout> timeout = pool.upstream.idle_timeout.timeout();
    return timeout
               ? fmt::format("{} closes connections that have rested for {} ({}, within {} ms)", endpoint(pool.where),
                             duration_text(timeout->ms), counted(timeout->samples, "sample"), timeout->spread_ms())
               : std::string();
}

std::string own_text(const Pool& pool)
{
    const std::string who = pool.process.empty() ? "this host" : printable(pool.process);
    if (const auto own = pool.upstream.own_idle_limit.timeout())
        return fmt::format("{} closes them after {}", who, duration_text(own->ms));
    if (pool.upstream.longest_reused_idle_ms > 0)
        return fmt::format("{} has used them again after up to {}", who,
                           duration_text(pool.upstream.longest_reused_idle_ms));
    return fmt::format("{} has used none of them again so far", who);
}

void add_finding(Page& page, const Diagnosis& diagnosis, const Watched& watched, const Finding& finding,
                 std::size_t number)
{
    const Pool* pool = pool_of(diagnosis, finding);
    page.line();
    page.line(fmt::format("{} {}  {}  {}", page.paint().bold(fmt::format("{}.", number)),
                          page.paint().red(to_string(finding.cause)), endpoint(finding.where),
                          fmt::format("{} died", counted(finding.count, "request"))));
    page.paragraph(why_text(finding), 3);
    page.paragraph(clients_text(finding, watched.tells_outcomes), 3);
    const std::string first = watched.clock.time_of_day(finding.first_ns);
    page.paragraph(finding.count == 1 ? fmt::format("At {}:", first)
                                      : fmt::format("From {} to {}. The most telling one:", first,
                                                    watched.clock.time_of_day(finding.last_ns)),
                   3);
    const Sighting sighting{.judged = finding.instance.e,
                            .last = finding.instance.last,
                            .verdict = finding.instance.verdict,
                            .outcome = finding.instance.outcome,
                            .idle_timeout = pool != nullptr ? pool->upstream.idle_timeout.timeout() : std::nullopt,
                            .process_name = finding.instance.process};
    page.add(timeline(sighting, watched.clock, page.paint(), page.width() > 5 ? page.width() - 5 : 1), 5);
    page.head("   What to change");
    if (is_race(finding.cause) && pool != nullptr && pool->upstream.idle_timeout.timeout() &&
        finding.reasons.count(Reason::restart) == 0) {
        page.paragraph(fmt::format("{}; {}.", timeout_text(*pool), own_text(*pool)), 5);
        add_remedies(page, *pool, 5);
    } else {
        page.paragraph(text_of(finding.cause).remedy, 5);
    }
}

void add_pools(Page& page, const Diagnosis& diagnosis)
{
    const std::vector<const Pool*> pools = diagnosis.pools();
    if (pools.empty())
        return;
    page.line();
    page.head("Upstreams");
    for (std::size_t number = 0; number < pools.size(); ++number) {
        if (number == most_pools) {
            page.line(fmt::format("  and {} more: --json tells all, --upstream chooses", pools.size() - number));
            break;
        }
        const Pool* pool = pools[number];
        const UpstreamCounts& counts = pool->upstream.counts;
        const std::string state(to_string(pool->exposure.state));
        page.line(fmt::format("  {}  {}, {}  {}", pool->other ? "all others" : endpoint(pool->where),
                              counted(counts.closed, "connection"), counted(counts.exchanges, "request"),
                              pool->exposure.state == PoolState::exposed   ? page.paint().red(state)
                              : pool->exposure.state == PoolState::unknown ? page.paint().yellow(state)
                                                                           : page.paint().green(state)));
        switch (pool->exposure.state) {
        case PoolState::exposed:
            page.paragraph(fmt::format("{}; {}.", timeout_text(*pool), own_text(*pool)), 4);
            page.paragraph(
                fmt::format("Races to be expected: {}, if requests go on as they did ({:.0f} after more than "
                            "half that time); one is lost if it comes within {:.1f} ms of the timer. Races "
                            "seen: {}.",
                            rate_text(pool->exposure.races_a_day), pool->exposure.late_reuses, pool->exposure.window_ms,
                            races_of(*pool)),
                4);
            break;
        case PoolState::safe:
            page.paragraph(
                fmt::format("{}, before the upstream does: no request can meet an idle close.", own_text(*pool)), 4);
            break;
        case PoolState::not_reused:
            page.paragraph("Each connection carries one request: no request can meet an idle close.", 4);
            break;
        case PoolState::unknown:
            page.paragraph("Not enough has been seen of how its connections end: watch for longer.", 4);
            break;
        }
    }
}

/// What exposed pools need that no finding has said already.
void add_exposed(Page& page, const Diagnosis& diagnosis)
{
    const std::vector<const Finding*> findings = diagnosis.findings();
    for (const Pool* pool : diagnosis.pools()) {
        const bool told = std::any_of(findings.begin(), findings.end(), [&](const Finding* finding) {
            return is_race(finding->cause) && finding->where == pool->where;
        });
        if (pool->exposure.state != PoolState::exposed || pool->other || told)
            continue;
        page.line();
        page.head(fmt::format("Before a request dies at {}", endpoint(pool->where)));
        add_remedies(page, *pool, 2);
    }
}

std::string conclusion(const Diagnosis& diagnosis, const Watched& watched)
{
    switch (diagnosis.state(watched.lost > 0)) {
    case Diagnosis::State::healthy:
        return "Healthy: nothing failed, and no pool can race with its upstream.";
    case Diagnosis::State::exposed:
        return "Nothing failed so far, but a pool races with its upstream's timer: it is a matter of time.";
    case Diagnosis::State::findings: {
        std::uint64_t died = 0;
        std::uint64_t hidden = 0;
        for (const Finding* finding : diagnosis.findings()) {
            died += finding->count;
            hidden += finding->hidden;
        }
        return fmt::format("{} died, of {}{}.", counted(died, "request"), counted(diagnosis.findings().size(), "cause"),
                           hidden > 0 ? fmt::format("; a retry hid {} from its client", hidden) : "");
    }
    case Diagnosis::State::inconclusive:
        return watched.lost > 0 ? "Inconclusive: events were lost, so that nothing failed can't be trusted."
               : diagnosis.requests() == 0
                   ? "Inconclusive: no request was seen. Watch for longer, or while there is traffic."
                   : "Inconclusive: nothing failed, but not enough was seen of how connections end. Watch for longer.";
    }
    return {};
}

double seconds(std::uint64_t ns)
{
    return static_cast<double>(ns) / 1e9;
}

Json timeout_json(const IdleTimeout& timeout)
{
    return {{"ms", timeout.ms}, {"spread_ms", timeout.spread_ms()}, {"samples", timeout.samples}};
}

Json endpoint_json(const UpstreamKey& key)
{
    return {{"address", address_text(key.address.data(), key.family)}, {"port", key.port}};
}

template <typename Name>
Json counts_json(const std::map<Name, std::uint64_t>& counts)
{
    Json json = Json::object();
    for (const auto& [name, count] : counts)
        if constexpr (std::is_integral_v<Name>)
            json[std::to_string(name)] = count;
        else
            json[std::string(to_string(name))] = count;
    return json;
}

Json remedies_json(const Pool& pool)
{
    Json json = Json::array();
    if (const std::optional<IdleTimeout> timeout = pool.upstream.idle_timeout.timeout())
        for (const Remedy& way : remedies(*timeout, pool.upstream.own_idle_limit.timeout(), pool.process))
            json.push_back({{"end", way.end == Remedy::End::proxy ? "proxy" : "upstream"},
                            {"settings", way.settings},
                            {"why", way.why}});
    return json;
}

} // namespace

std::string_view to_string(PoolState state)
{
    switch (state) {
    case PoolState::unknown:
        return "unknown";
    case PoolState::not_reused:
        return "not_reused";
    case PoolState::safe:
        return "safe";
    case PoolState::exposed:
        return "exposed";
    }
    return {};
}

std::string_view to_string(Diagnosis::State state)
{
    switch (state) {
    case Diagnosis::State::healthy:
        return "healthy";
    case Diagnosis::State::exposed:
        return "exposed";
    case Diagnosis::State::findings:
        return "findings";
    case Diagnosis::State::inconclusive:
        return "inconclusive";
    }
    return {};
}

std::string report_text(const Diagnosis& diagnosis, const Watched& watched, const Paint& paint, std::size_t width)
{
    Page page(paint, width);
    page.paragraph(fmt::format("finrace on {}: {}, {:.1f} s, {}, {}", printable(watched.host_name), watched.source,
                               seconds(watched.observed_ns), counted(diagnosis.pools().size(), "upstream"),
                               counted(diagnosis.requests(), "request")),
                   0);
    page.head(conclusion(diagnosis, watched));
    if (watched.lost > 0)
        page.line(paint.red(fmt::format("{} lost: the counts below are too low.", counted(watched.lost, "event"))));
    if (watched.missing_hooks > 0)
        page.paragraph(fmt::format("{} could not be attached: finrace doctor tells what can't be seen without.",
                                   counted(watched.missing_hooks, "hook")),
                       0);
    if (const std::uint64_t count = diagnosis.unclassified(); count > 0)
        page.paragraph(fmt::format("{} in mid-exchange without a cause that can be named (finrace explain "
                                   "unclassified).",
                                   count == 1 ? "1 connection ended" : fmt::format("{} connections ended", count)),
                       0);
    std::size_t number = 0;
    for (const Finding* finding : diagnosis.findings())
        add_finding(page, diagnosis, watched, *finding, ++number);
    add_exposed(page, diagnosis);
    add_pools(page, diagnosis);
    return page.take();
}

Json report_json(const Diagnosis& diagnosis, const Watched& watched)
{
    Json findings = Json::array();
    for (const Finding* finding : diagnosis.findings()) {
        const Pool* pool = pool_of(diagnosis, *finding);
        Json json = {{"cause", to_string(finding->cause)},
                     {"side", finding->server_side ? "server" : "client"},
                     {finding->server_side ? "listener" : "upstream", endpoint_json(finding->where)},
                     {"requests", finding->count},
                     {"hidden_by_retry", finding->hidden},
                     {"certainty", counts_json(finding->certainties)},
                     {"reason", counts_json(finding->reasons)},
                     {"answers", counts_json(finding->answers)},
                     {"clients_left", finding->clients_left},
                     {"first", watched.clock.rfc3339(finding->first_ns)},
                     {"last", watched.clock.rfc3339(finding->last_ns)},
                     {"message", finding->instance.verdict.message},
                     {"remedy", text_of(finding->cause).remedy}};
        if (is_race(finding->cause) && pool != nullptr)
            json["remedies"] = remedies_json(*pool);
        findings.push_back(std::move(json));
    }
    Json upstreams = Json::array();
    for (const Pool* pool : diagnosis.pools()) {
        Json json = pool->other ? Json{{"other", true}} : endpoint_json(pool->where);
        const Upstream& upstream = pool->upstream;
        json["state"] = to_string(pool->exposure.state);
        json["connections"] = upstream.counts.closed;
        json["requests"] = upstream.counts.exchanges;
        json["unclassified"] = upstream.counts.unclassified;
        json["longest_reused_idle_ms"] = upstream.longest_reused_idle_ms;
        if (const auto timeout = upstream.idle_timeout.timeout())
            json["idle_timeout"] = timeout_json(*timeout);
        if (const auto own = upstream.own_idle_limit.timeout())
            json["own_idle_limit"] = timeout_json(*own);
        if (!pool->process.empty())
            json["process"] = printable(pool->process);
        if (pool->exposure.state == PoolState::exposed) {
            json["exposure"] = {{"window_ms", pool->exposure.window_ms},
                                {"late_reuses", pool->exposure.late_reuses},
                                {"share", pool->exposure.share},
                                {"races_seen", races_of(*pool)},
                                {"races_a_day", pool->exposure.races_a_day}};
            json["remedies"] = remedies_json(*pool);
        }
        upstreams.push_back(std::move(json));
    }
    return {{"schema", report_schema},
            {"state", to_string(diagnosis.state(watched.lost > 0))},
            {"host", printable(watched.host_name)},
            {"source", watched.source},
            {"observed_s", seconds(watched.observed_ns)},
            {"requests", diagnosis.requests()},
            {"lost", watched.lost},
            {"missing_hooks", watched.missing_hooks},
            {"findings", std::move(findings)},
            {"upstreams", std::move(upstreams)}};
}

} // namespace finrace
