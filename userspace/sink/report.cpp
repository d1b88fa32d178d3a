// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/report.h"

#include <algorithm>
#include <map>
#include <set>
#include <type_traits>
#include <utility>
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
constexpr std::size_t most_shown = 20; ///< findings, or upstreams, on a page for people

std::string endpoint(const UpstreamKey& key)
{
    return endpoint_text(key.address.data(), key.port, key.family);
}

std::string counted(std::uint64_t count, std::string_view one)
{
    return fmt::format("{} {}{}", count, one, count == 1 ? "" : "s");
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

/// Two containers may have the same loopback address: then the network namespace tells them apart.
class Places {
public:
    explicit Places(const Diagnosis& diagnosis)
    {
        for (const Pool* pool : diagnosis.pools())
            note(pool->where);
        for (const Finding* finding : diagnosis.findings())
            note(finding->where);
    }

    [[nodiscard]] std::string name(const UpstreamKey& key) const
    {
        const std::string name = endpoint(key);
        const auto found = networks_.find(name);
        return found != networks_.end() && found->second.size() > 1
                   ? fmt::format("{} (network namespace {})", name, key.netns)
                   : name;
    }

private:
    void note(const UpstreamKey& key) { networks_[endpoint(key)].insert(key.netns); }

    std::map<std::string, std::set<std::uint32_t>> networks_;
};

/// "12 requests died"
std::string affected_text(const Finding& finding)
{
    switch (finding.cause) {
    case Cause::connect_refused:
    case Cause::connect_timeout:
    case Cause::connect_unreachable:
    case Cause::handshake_failed:
        return fmt::format("{} failed", counted(finding.affected, "attempt"));
    case Cause::accept_overflow:
        return fmt::format("{} turned away", counted(finding.affected, "connection"));
    case Cause::upstream_benched:
        return fmt::format("{} answered without an upstream", counted(finding.affected, "request"));
    case Cause::client_abort:
        return fmt::format("{} left before the answer", counted(finding.affected, "client"));
    default:
        return fmt::format("{} died", counted(finding.affected, "request"));
    }
}

std::string clients_text(const Finding& finding, const Watched& watched)
{
    if (!watched.captures.empty())
        return "What clients got is not known: a capture does not show it.";
    if (!watched.tells_outcomes)
        return "What clients got is not known: backend cgroup does not see it.";
    std::vector<std::string> parts;
    std::uint64_t known = finding.clients_left;
    for (const auto& [status, count] : finding.answers) {
        parts.push_back(fmt::format("{} × {}", count, status));
        known += count;
    }
    if (finding.clients_left > 0)
        parts.push_back(fmt::format("{} closed on without an answer, or gone", finding.clients_left));
    if (known < finding.verdicts)
        parts.push_back(fmt::format("{} not known", finding.verdicts - known));
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
    std::uint64_t known = 0;
    for (const auto& [reason, count] : finding.reasons) {
        parts.push_back(fmt::format("{} {}", count, to_string(reason)));
        known += count;
    }
    if (!parts.empty() && known < finding.verdicts)
        parts.push_back(fmt::format("{} not known", finding.verdicts - known));
    if (!parts.empty())
        text += fmt::format(". Why the upstream closed: {}", fmt::join(parts, ", "));
    return text + ".";
}

/// The pool whose timer a finding is about, and is known.
const Pool* pool_to_set(const Diagnosis& diagnosis, const Finding& finding)
{
    if (!finding.is_of_timer())
        return nullptr;
    const Pool* pool = diagnosis.pool(finding.where);
    return pool != nullptr && pool->upstream.idle_timeout.timeout() ? pool : nullptr;
}

std::vector<Remedy> remedies_of(const Pool& pool)
{
    return remedies(*pool.upstream.idle_timeout.timeout(), pool.upstream.own_idle_limit.timeout(), pool.process);
}

void add_remedies(Page& page, const Pool& pool, std::size_t indent)
{
    for (const Remedy& way : remedies_of(pool)) {
        const bool raise = way.end == Remedy::End::upstream;
        if (way.settings.empty()) {
            page.paragraph(fmt::format("{}: {}.", raise ? "The upstream" : "The proxy", way.why), indent);
            continue;
        }
        page.paragraph(
            fmt::format("{} ({}):", raise ? "Raise the upstream's idle timeout" : "Or let the proxy close first",
                        way.why),
            indent);
        for (const Remedy::Setting& setting : way.settings)
            page.line(fmt::format("{:{}}{}: {}{}", "", indent + 2, setting.software, page.paint().bold(setting.text),
                                  setting.note.empty() ? "" : fmt::format("  ({})", setting.note)));
    }
}

std::string timeout_text(const Places& places, const Pool& pool)
{
    const IdleTimeout timeout = *pool.upstream.idle_timeout.timeout();
    return fmt::format("{} closes connections that have rested for {} ({}, within {} ms)", places.name(pool.where),
                       duration_text(timeout.ms), counted(timeout.samples, "sample"), timeout.spread_ms());
}

std::string own_text(const Pool& pool)
{
    const std::string who = pool.process.empty() ? "this host" : printable(pool.process);
    if (const auto own = pool.upstream.own_idle_limit.timeout();
        own && own->highest_ms >= pool.upstream.longest_reused_idle_ms)
        return fmt::format("{} closes them after {}", who, duration_text(own->ms));
    if (pool.upstream.longest_reused_idle_ms > 0)
        return fmt::format("{} has used them again after up to {}", who,
                           duration_text(pool.upstream.longest_reused_idle_ms));
    return fmt::format("{} has used none of them again so far", who);
}

void add_finding(Page& page, const Diagnosis& diagnosis, const Watched& watched, const Places& places,
                 const Finding& finding, std::size_t number)
{
    const WallClock real(0);
    page.line();
    page.line(fmt::format("{} {}  {}  {}", page.paint().bold(fmt::format("{}.", number)),
                          page.paint().red(to_string(finding.cause)), places.name(finding.where),
                          affected_text(finding)));
    page.paragraph(why_text(finding), 3);
    if (!finding.server_side)
        page.paragraph(clients_text(finding, watched), 3);
    const std::string first = real.time_of_day(finding.first_ns);
    page.paragraph(finding.verdicts == 1
                       ? fmt::format("At {}:", first)
                       : fmt::format("From {} to {}. The most telling one:", first, real.time_of_day(finding.last_ns)),
                   3);
    const Pool* pool = diagnosis.pool(finding.where);
    const Sighting sighting{
        .judged = finding.instance.e,
        .last = finding.instance.last,
        .verdict = finding.instance.verdict,
        .outcome = finding.instance.outcome,
        .idle_timeout = pool != nullptr && !finding.server_side ? pool->upstream.idle_timeout.timeout() : std::nullopt,
        .process_name = finding.instance.process};
    page.add(timeline(sighting, WallClock(finding.instance.clock_offset_ns), page.paint(),
                      page.width() > 5 ? page.width() - 5 : 1),
             5);
    page.head("   What to change");
    const Pool* to_set = pool_to_set(diagnosis, finding);
    if (to_set != nullptr) {
        page.paragraph(fmt::format("{}; {}.", timeout_text(places, *to_set), own_text(*to_set)), 5);
        add_remedies(page, *to_set, 5);
    }
    if (to_set == nullptr || finding.is_of_more_than_timer())
        page.paragraph(text_of(finding.cause).remedy, 5);
}

void add_pool(Page& page, const Places& places, const Pool& pool)
{
    const PoolState pool_state = pool.exposure.state;
    const std::string state(to_string(pool_state));
    page.line(fmt::format(
        "  {}  {} on {}{}  {}", pool.other ? "all others" : places.name(pool.where), counted(pool.requests, "request"),
        counted(pool.connections, "connection"), pool.open > 0 ? fmt::format(" and {} still open", pool.open) : "",
        pool_state == PoolState::exposed                                          ? page.paint().red(state)
        : pool_state == PoolState::unknown || pool_state == PoolState::kept_clear ? page.paint().yellow(state)
                                                                                  : page.paint().green(state)));
    switch (pool_state) {
    case PoolState::exposed:
        page.paragraph(fmt::format("{}; {}.", timeout_text(places, pool), own_text(pool)), 4);
        page.paragraph(
            fmt::format("Races to be expected: {}, if requests go on as they did ({:.0f} after more than half "
                        "that time); one is lost if it comes within {:.1f} ms of the timer. Races seen: {}.",
                        rate_text(pool.exposure.races_a_day), pool.exposure.late_reuses, pool.exposure.window_ms,
                        pool.races),
            4);
        break;
    case PoolState::kept_clear:
        page.paragraph(
            fmt::format("{}; of {:.0f} requests after more than half that time none came near it. A limit that "
                        "is looked at as a connection is used again (Apache httpd's ttl) looks like this, or "
                        "chance.",
                        timeout_text(places, pool), pool.exposure.late_reuses),
            4);
        break;
    case PoolState::safe:
        page.paragraph(fmt::format("{}, before the upstream does: no request can meet an idle close.", own_text(pool)),
                       4);
        break;
    case PoolState::not_reused:
        page.paragraph("Each connection carries one request: no request can meet an idle close.", 4);
        break;
    case PoolState::unknown:
        if (pool.upstream.idle_timeout.timeout())
            page.paragraph(fmt::format("{}; {}.", timeout_text(places, pool), own_text(pool)), 4);
        else
            page.paragraph("Who closes its idle connections, and after how long, has not shown.", 4);
        break;
    }
}

void add_pools(Page& page, const Diagnosis& diagnosis, const Places& places)
{
    const std::vector<const Pool*> pools = diagnosis.pools();
    if (pools.empty())
        return;
    page.line();
    page.head("Upstreams");
    for (std::size_t number = 0; number < std::min(pools.size(), most_shown); ++number)
        add_pool(page, places, *pools[number]);
    if (pools.size() > most_shown)
        page.line(fmt::format("  and {} more: --json tells all, --upstream chooses", pools.size() - most_shown));
}

/// What exposed pools need that no finding has said already.
void add_exposed(Page& page, const Diagnosis& diagnosis, const Places& places, const std::set<const Pool*>& told)
{
    std::size_t shown = 0;
    for (const Pool* pool : diagnosis.pools()) {
        if (pool->exposure.state != PoolState::exposed || pool->other || told.count(pool) != 0)
            continue;
        if (++shown > most_shown)
            return;
        page.line();
        page.head(fmt::format("Before a request dies at {}", places.name(pool->where)));
        add_remedies(page, *pool, 2);
    }
}

std::string conclusion(const Diagnosis& diagnosis, const Watched& watched, const Places& places)
{
    switch (diagnosis.state(watched.is_partial())) {
    case Diagnosis::State::healthy:
        return "Healthy: nothing failed, and no pool can race with its upstream.";
    case Diagnosis::State::exposed:
        return "Nothing failed so far, but a pool races with its upstream's timer: it is a matter of time.";
    case Diagnosis::State::findings: {
        const std::vector<const Finding*> findings = diagnosis.findings();
        const Finding& worst = *findings.front();
        return fmt::format("{}: {}{} at {}: {}.", counted(findings.size(), "finding"),
                           findings.size() > 1 ? "the worst is " : "", to_string(worst.cause), places.name(worst.where),
                           affected_text(worst));
    }
    case Diagnosis::State::inconclusive:
        if (watched.server_side_only)
            return "Inconclusive: no server's failure was seen; what healthy ones do is not followed.";
        if (watched.lost > 0)
            return "Inconclusive: not all was seen, so that nothing failed can't be trusted.";
        if (diagnosis.requests() == 0)
            return diagnosis.open() > 0 || watched.adopted_open > 0
                       ? "Inconclusive: no connection has ended yet, which is when its requests are known. Watch for "
                         "longer."
                       : "Inconclusive: no request was seen. Watch for longer, or while there is traffic.";
        return "Inconclusive: nothing failed, but not enough was seen of how connections end.";
    }
    return {};
}

/// "taken at the end of the host that opened the connections (10.0.0.1), sure"
std::string taken_text(const CaptureSeen& capture)
{
    const std::string host = capture.host.empty() ? "" : fmt::format(" ({})", capture.host);
    const char* certainty = capture.sure ? "sure" : "likely";
    switch (capture.place) {
    case CaptureSeen::Place::client:
        return fmt::format("taken at the end that opened the connections{}, {}", host, certainty);
    case CaptureSeen::Place::server:
        return fmt::format("taken at the upstream's end{}, {}", host, certainty);
    case CaptureSeen::Place::both:
        return fmt::format("taken on a host that has both ends, {}", certainty);
    case CaptureSeen::Place::between:
        return fmt::format("taken between the two ends, {}", certainty);
    case CaptureSeen::Place::mixed:
        return fmt::format("taken at the end that opened {} and accepted {} connections{}, {}", capture.at_client,
                           capture.at_server, host, certainty);
    case CaptureSeen::Place::unknown:
        break;
    }
    return "where it was taken does not show";
}

void add_captures(Page& page, const Watched& watched)
{
    for (const CaptureSeen& capture : watched.captures) {
        std::string text = fmt::format("{}: {}", capture.file, taken_text(capture));
        text += capture.guessed == 0 ? "."
                                     : fmt::format("; {} without a handshake, whose client is guessed.",
                                                   counted(capture.guessed, "connection"));
        page.paragraph(text, 0);
    }
    if (!watched.captures.empty())
        page.paragraph("A capture does not show processes, who closed a socket, what lay unread, retries, nor what the "
                       "clients behind a proxy got.",
                       0);
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
    Json json = {{"address", address_text(key.address.data(), key.family)}, {"port", key.port}};
    if (key.netns != 0)
        json["netns"] = key.netns;
    return json;
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
    for (const Remedy& way : remedies_of(pool)) {
        Json settings = Json::array();
        for (const Remedy::Setting& setting : way.settings) {
            Json one = {{"software", setting.software}, {"setting", setting.text}};
            if (!setting.note.empty())
                one["note"] = setting.note;
            settings.push_back(std::move(one));
        }
        json.push_back({{"end", way.end == Remedy::End::proxy ? "proxy" : "upstream"},
                        {"settings", std::move(settings)},
                        {"why", way.why}});
    }
    return json;
}

Json capture_json(const CaptureSeen& capture)
{
    Json json = {{"file", capture.file}, {"taken_at", to_string(capture.place)}};
    if (capture.place != CaptureSeen::Place::unknown)
        json["certainty"] = capture.sure ? "sure" : "likely";
    if (!capture.host.empty())
        json["host"] = capture.host;
    json["segments"] = capture.segments;
    json["unreadable"] = capture.unreadable;
    json["missing"] = capture.missing;
    json["one_direction"] = capture.one_direction;
    json["guessed"] = capture.guessed;
    return json;
}

Json finding_json(const Diagnosis& diagnosis, const Finding& finding)
{
    const WallClock real(0);
    Json json = {{"cause", to_string(finding.cause)},
                 {"side", finding.server_side ? "server" : "client"},
                 {finding.server_side ? "listener" : "upstream", endpoint_json(finding.where)},
                 {"verdicts", finding.verdicts},
                 {"affected", finding.affected},
                 {"hidden_by_retry", finding.hidden},
                 {"certainty", counts_json(finding.certainties)},
                 {"reason", counts_json(finding.reasons)},
                 {"answers", counts_json(finding.answers)},
                 {"clients_left", finding.clients_left},
                 {"first", real.rfc3339(finding.first_ns)},
                 {"last", real.rfc3339(finding.last_ns)},
                 {"message", printable(finding.instance.verdict.message)}};
    const Pool* to_set = pool_to_set(diagnosis, finding);
    if (to_set != nullptr)
        json["remedies"] = remedies_json(*to_set);
    if (to_set == nullptr || finding.is_of_more_than_timer())
        json["remedy"] = text_of(finding.cause).remedy;
    return json;
}

Json pool_json(const Pool& pool)
{
    Json json = pool.other ? Json{{"other", true}} : endpoint_json(pool.where);
    const Upstream& upstream = pool.upstream;
    json["state"] = to_string(pool.exposure.state);
    json["connections"] = pool.connections;
    json["open"] = pool.open;
    json["requests"] = pool.requests;
    json["races"] = pool.races;
    json["unclassified"] = pool.unclassified;
    json["longest_reused_idle_ms"] = upstream.longest_reused_idle_ms;
    if (const auto timeout = upstream.idle_timeout.timeout())
        json["idle_timeout"] = timeout_json(*timeout);
    if (const auto own = upstream.own_idle_limit.timeout())
        json["own_idle_limit"] = timeout_json(*own);
    if (!pool.process.empty())
        json["process"] = printable(pool.process);
    if (pool.exposure.state == PoolState::exposed) {
        json["exposure"] = {{"window_ms", pool.exposure.window_ms},
                            {"late_reuses", pool.exposure.late_reuses},
                            {"share", pool.exposure.share},
                            {"races_a_day", pool.exposure.races_a_day}};
        json["remedies"] = remedies_json(pool);
    }
    return json;
}

} // namespace

std::string_view to_string(CaptureSeen::Place place)
{
    switch (place) {
    case CaptureSeen::Place::client:
        return "client";
    case CaptureSeen::Place::server:
        return "server";
    case CaptureSeen::Place::both:
        return "both";
    case CaptureSeen::Place::between:
        return "between";
    case CaptureSeen::Place::mixed:
        return "mixed";
    case CaptureSeen::Place::unknown:
        break;
    }
    return "unknown";
}

std::string_view to_string(PoolState state)
{
    switch (state) {
    case PoolState::unknown:
        return "unknown";
    case PoolState::not_reused:
        return "not_reused";
    case PoolState::safe:
        return "safe";
    case PoolState::kept_clear:
        return "kept_clear";
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
    const Places places(diagnosis);
    page.paragraph(fmt::format("finrace{}: {}, {:.1f} s, {}, {} on {}{}",
                               watched.host_name.empty() ? "" : " on " + printable(watched.host_name), watched.source,
                               seconds(watched.observed_ns), counted(diagnosis.pools().size(), "upstream"),
                               counted(diagnosis.requests(), "request"), counted(diagnosis.connections(), "connection"),
                               diagnosis.open() > 0 ? fmt::format(" and {} still open", diagnosis.open()) : ""),
                   0);
    add_captures(page, watched);
    page.head(conclusion(diagnosis, watched, places));
    if (watched.lost > 0)
        page.line(
            paint.red(fmt::format("{} not seen, or lost: the counts below are too low.",
                                  watched.lost == 1 ? "1 event was" : fmt::format("{} events were", watched.lost))));
    if (watched.adopted_open > 0 && (!watched.chosen || diagnosis.requests() == 0))
        page.paragraph(fmt::format("{} older than {}, and {} not ended: nothing is known of {} yet.",
                                   watched.adopted_open == 1 ? "1 connection is"
                                                             : fmt::format("{} connections are", watched.adopted_open),
                                   watched.captures.empty() ? "finrace, on this host" : "the capture",
                                   watched.adopted_open == 1 ? "has" : "have",
                                   watched.adopted_open == 1 ? "it" : "them"),
                       0);
    if (watched.missing_hooks > 0)
        page.paragraph(fmt::format("{} could not be attached: finrace doctor tells what can't be seen without.",
                                   counted(watched.missing_hooks, "hook")),
                       0);
    if (const std::uint64_t count = diagnosis.unclassified(); count > 0)
        page.paragraph(fmt::format("{} in mid-exchange without a cause that can be named (finrace explain "
                                   "unclassified).",
                                   count == 1 ? "1 connection ended" : fmt::format("{} connections ended", count)),
                       0);
    std::set<const Pool*> told;
    std::size_t number = 0;
    for (const Finding* finding : diagnosis.findings()) {
        if (++number <= most_shown)
            add_finding(page, diagnosis, watched, places, *finding, number);
        if (const Pool* pool = pool_to_set(diagnosis, *finding); pool != nullptr && number <= most_shown)
            told.insert(pool);
    }
    if (number > most_shown || diagnosis.more_failures() > 0) {
        page.line();
        page.line(fmt::format("And {} more: --json tells all, --upstream chooses{}.",
                              counted(number - std::min(number, most_shown), "finding"),
                              diagnosis.more_failures() > 0
                                  ? fmt::format("; {} failures elsewhere are counted alone", diagnosis.more_failures())
                                  : ""));
    }
    add_exposed(page, diagnosis, places, told);
    add_pools(page, diagnosis, places);
    return page.take();
}

Json report_json(const Diagnosis& diagnosis, const Watched& watched)
{
    Json findings = Json::array();
    for (const Finding* finding : diagnosis.findings())
        findings.push_back(finding_json(diagnosis, *finding));
    Json upstreams = Json::array();
    for (const Pool* pool : diagnosis.pools())
        upstreams.push_back(pool_json(*pool));
    Json json = {{"schema", report_schema},
                 {"state", to_string(diagnosis.state(watched.is_partial()))},
                 {"host", printable(watched.host_name)},
                 {"source", watched.source},
                 {"observed_s", seconds(watched.observed_ns)},
                 {"connections", diagnosis.connections()},
                 {"open", diagnosis.open()},
                 {"requests", diagnosis.requests()},
                 {"lost", watched.lost},
                 {"adopted_open", watched.adopted_open},
                 {"missing_hooks", watched.missing_hooks},
                 {"more_failures", diagnosis.more_failures()},
                 {"findings", std::move(findings)},
                 {"upstreams", std::move(upstreams)}};
    for (const CaptureSeen& capture : watched.captures)
        json["captures"].push_back(capture_json(capture));
    return json;
}

} // namespace finrace
