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
#include "sink/json.h"
#include "sink/timeline.h"

namespace finrace {

namespace {

constexpr int report_schema = 1;

class Page {
public:
    Page(const Paint& paint, std::size_t width) : paint_(paint), width_(width) {}

    void line(std::string_view text = {}) { text_ += fmt::format("{}\n", text); }
    void head(std::string_view text)
    {
        for (const std::string& one : wrap(text, width_))
            line(paint_.bold(one));
    }
    void alarm(std::string_view text)
    {
        for (const std::string& one : wrap(text, width_))
            line(paint_.red(one));
    }
    void paragraph(std::string_view text, std::size_t indent)
    {
        for (const std::string& one : wrap(text, width_ > indent ? width_ - indent : 1))
            line(fmt::format("{:{}}{}", "", indent, one));
    }
    /// Parts that stay whole, on one line or, what does not fit there, below it.
    void flowing(const std::vector<std::string>& parts, std::size_t indent)
    {
        std::string one = fmt::format("{:{}}{}", "", indent, parts.front());
        for (std::size_t i = 1; i < parts.size(); ++i) {
            if (columns(one) + 2 + columns(parts[i]) > width_) {
                line(one);
                one = fmt::format("{:{}}{}", "", indent + 2, parts[i]);
            } else {
                one += "  " + parts[i];
            }
        }
        line(one);
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

void add_remedies(Page& page, const Pool& pool, std::size_t indent)
{
    bool first = true;
    for (const Remedy& way : remedies_of(pool)) {
        page.paragraph(remedy_text(way, first), indent);
        first = false;
        for (const Remedy::Setting& setting : way.settings) {
            std::vector<std::string> parts{fmt::format("{}: {}", setting.software, page.paint().bold(setting.text))};
            if (!setting.note.empty())
                parts.push_back(fmt::format("({})", setting.note));
            page.flowing(parts, indent + 2);
            for (const Present& present : setting.present)
                page.paragraph(present_text(present), indent + 4);
        }
    }
}

/// `told`: what there is to change, and for which number that was told before.
void add_finding(Page& page, const Diagnosis& diagnosis, const Watched& watched, const Places& places,
                 const Finding& finding, std::size_t number, std::map<std::string, std::size_t>& told)
{
    page.line();
    page.flowing({page.paint().bold(fmt::format("{}.", number)) + " " + page.paint().red(to_string(finding.cause)),
                  places.name(finding.where), affected_text(finding)},
                 0);
    page.paragraph(why_text(finding), 3);
    if (!finding.server_side)
        page.paragraph(clients_text(finding, watched), 3);
    page.paragraph(waits_text(finding), 3);
    page.paragraph(hosts_text(finding), 3);
    page.paragraph(times_text(finding), 3);
    page.add(timeline(sighting_of(diagnosis, finding), WallClock(finding.instance.clock_offset_ns), page.paint(),
                      page.width() > 5 ? page.width() - 5 : 1),
             5);
    Page change(page.paint(), page.width());
    if (const Pool* to_set = pool_to_set(diagnosis, finding); to_set != nullptr) {
        change.paragraph(limits_text(places, *to_set), 5);
        add_remedies(change, *to_set, 5);
    }
    for (const std::string& hint : hints(diagnosis, watched, finding))
        change.paragraph(hint, 5);
    const std::string text = change.take();
    if (const auto [first, is_new] = told.try_emplace(text, number); !is_new) {
        page.paragraph(fmt::format("What to change: as for {}.", first->second), 3);
        return;
    }
    page.head("   What to change");
    page.add(text, 0);
}

void add_pool(Page& page, const Places& places, const Pool& pool)
{
    const PoolState state = pool.exposure.state;
    const Paint& paint = page.paint();
    page.flowing({name_text(places, pool), traffic_text(pool),
                  state == PoolState::exposed                                     ? paint.red(to_string(state))
                  : state == PoolState::unknown || state == PoolState::kept_clear ? paint.yellow(to_string(state))
                                                                                  : paint.green(to_string(state))},
                 2);
    for (const std::string& one : pool_text(places, pool))
        page.paragraph(one, 4);
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
        page.paragraph(fmt::format("and {} more: --json tells all, --upstream chooses", pools.size() - most_shown), 2);
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

double seconds(std::uint64_t ns)
{
    return static_cast<double>(ns) / 1e9;
}

Json range_json(const Exposure::Range& range)
{
    return {{"low", range.low}, {"high", range.high}};
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

Json present_json(const std::vector<Present>& settings)
{
    Json json = Json::array();
    for (const Present& present : settings) {
        Json one = {{"ms", present.ms}, {"place", printable(present.place)}};
        if (!present.text.empty())
            one["setting"] = printable(present.text);
        if (present.pending)
            one["pending"] = true;
        json.push_back(std::move(one));
    }
    return json;
}

Json end_json(const End& end)
{
    Json json = {{"software", end.software->software}};
    if (end.pid != 0)
        json["pid"] = end.pid;
    if (!end.present.empty())
        json["present"] = present_json(end.present);
    if (!end.recycling.empty())
        json["recycling"] = printable(end.recycling);
    if (!end.worker_limit.empty())
        json["worker_limit"] = present_json(end.worker_limit);
    return json;
}

Json remedies_json(const Pool& pool)
{
    Json json = Json::array();
    for (const Remedy& way : remedies_of(pool)) {
        Json settings = Json::array();
        for (const Remedy::Setting& setting : way.settings) {
            Json one = {{"software", setting.software}, {"setting", setting.text}, {"source", setting.source}};
            if (!setting.note.empty())
                one["note"] = setting.note;
            if (!setting.present.empty())
                one["present"] = present_json(setting.present);
            settings.push_back(std::move(one));
        }
        json.push_back({{"end", way.end == Remedy::End::proxy ? "proxy" : "upstream"},
                        {"settings", std::move(settings)},
                        {"why", way.why}});
    }
    return json;
}

Json elsewhere_json(const Elsewhere& elsewhere)
{
    Json json = endpoint_json(elsewhere.where);
    if (!elsewhere.process.empty())
        json["process"] = printable(elsewhere.process);
    json["connections"] = elsewhere.connections;
    return json;
}

Json capture_json(const CaptureSeen& capture)
{
    Json json = {{"file", capture.file}, {"taken_at", to_string(capture.place)}};
    if (capture.place != TakenAt::unknown)
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

Json finding_json(const Diagnosis& diagnosis, const Watched& watched, const Finding& finding)
{
    const WallClock real(0);
    Json json = {{"cause", to_string(finding.cause)},
                 {"side", finding.server_side ? "server" : "client"},
                 {finding.server_side ? "listener" : "upstream", endpoint_json(finding.where)},
                 {"verdicts", finding.verdicts},
                 {"affected", finding.affected},
                 {"hidden_by_retry", finding.hidden},
                 {"certainty", counts_json(finding.certainties)},
                 {"incomplete", finding.incomplete},
                 {"reason", counts_json(finding.reasons)},
                 {"answers", counts_json(finding.answers)},
                 {"clients_left", finding.clients_left},
                 {"first", real.rfc3339(finding.first_ns)},
                 {"last", real.rfc3339(finding.last_ns)},
                 {"bursts", finding.bursts},
                 {"message", printable(finding.instance.verdict.message)}};
    if (!finding.hosts.empty())
        json["hosts"] = finding.hosts;
    if (!finding.upstream_hosts.empty())
        json["upstream_hosts"] = finding.upstream_hosts;
    for (const std::uint64_t at_ns : finding.times_ns)
        json["times"].push_back(real.rfc3339(at_ns));
    if (finding.waits) {
        json["after_request"] = {{"lowest_ms", finding.waits->lowest_ms}, {"highest_ms", finding.waits->highest_ms}};
        if (const auto timer = finding.waits->timer())
            json["after_request"]["timer"] = timeout_json(*timer);
    }
    for (const auto& [cause, together] : finding.together)
        json["together"][to_string(cause)] = together.times;
    if (const Pool* to_set = pool_to_set(diagnosis, finding); to_set != nullptr)
        json["remedies"] = remedies_json(*to_set);
    if (const auto all = hints(diagnosis, watched, finding); !all.empty())
        json["hints"] = all;
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
    if (const auto timeout = pool.timeout(); timeout && timeout->samples > 0)
        json["idle_timeout"] = timeout_json(*timeout);
    if (const auto own = upstream.own_idle_limit.timeout())
        json["own_idle_limit"] = timeout_json(*own);
    if (!pool.process.empty())
        json["process"] = printable(pool.process);
    for (const auto& [host, state] : pool.hosts)
        json["hosts"][host] = to_string(state);
    if (pool.now.open > 0)
        json["in_use"] = {{"connections", pool.now.open}, {"requests", pool.now.requests}};
    if (pool.now.resting > 0)
        json["resting"] = {{"connections", pool.now.resting}, {"longest_ms", pool.now.longest_rest_ms}};
    for (const auto& [name, end] : {std::pair("proxy", &pool.ends.proxy), std::pair("server", &pool.ends.upstream)})
        if (end->software != nullptr)
            json[name] = end_json(*end);
    if (pool.exposure.state == PoolState::exposed) {
        json["exposure"] = {{"window_ms", pool.exposure.window_ms}, {"late_reuses", pool.exposure.late_reuses}};
        if (const auto expected = pool.exposure.expected()) {
            json["exposure"]["share"] = range_json(expected->share);
            json["exposure"]["races_a_day"] = range_json(expected->races_a_day);
        }
        json["remedies"] = remedies_json(pool);
    }
    return json;
}

} // namespace

std::string_view to_string(TakenAt place)
{
    switch (place) {
    case TakenAt::client:
        return "client";
    case TakenAt::server:
        return "server";
    case TakenAt::both:
        return "both";
    case TakenAt::between:
        return "between";
    case TakenAt::mixed:
        return "mixed";
    case TakenAt::unknown:
        break;
    }
    return "unknown";
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
    page.paragraph(subject_text(diagnosis, watched), 0);
    page.head(conclusion(diagnosis, watched, places));
    page.alarm(lost_text(watched));
    for (const std::string& caveat : caveats(diagnosis, watched))
        page.paragraph(caveat, 0);
    std::set<const Pool*> told;
    std::map<std::string, std::size_t> changes;
    std::size_t number = 0;
    for (const Finding* finding : diagnosis.findings()) {
        if (++number <= most_shown)
            add_finding(page, diagnosis, watched, places, *finding, number, changes);
        if (const Pool* pool = pool_to_set(diagnosis, *finding); pool != nullptr && number <= most_shown)
            told.insert(pool);
    }
    if (number > most_shown || diagnosis.more_failures() > 0) {
        page.line();
        page.paragraph(
            fmt::format("And {} more: --json tells all, --upstream chooses{}.",
                        counted(number - std::min(number, most_shown), "finding"),
                        diagnosis.more_failures() > 0
                            ? fmt::format("; {} failures elsewhere are counted alone", diagnosis.more_failures())
                            : ""),
            0);
    }
    const auto is_sure = [](const Finding* finding) {
        return finding->certainties.rbegin()->first == Certainty::proven;
    };
    if (const auto findings = diagnosis.findings(); !std::all_of(findings.begin(), findings.end(), is_sure)) {
        page.line();
        page.paragraph(certainties, 0);
    }
    add_exposed(page, diagnosis, places, told);
    add_pools(page, diagnosis, places);
    return page.take();
}

Json report_json(const Diagnosis& diagnosis, const Watched& watched)
{
    Json findings = Json::array();
    for (const Finding* finding : diagnosis.findings())
        findings.push_back(finding_json(diagnosis, watched, *finding));
    Json upstreams = Json::array();
    for (const Pool* pool : diagnosis.pools())
        upstreams.push_back(pool_json(*pool));
    Json json = {{"schema", report_schema},
                 {"state", to_string(diagnosis.state(watched.is_partial()))},
                 {"host", printable(watched.host_name)},
                 {"source", watched.source},
                 {"runs", diagnosis.runs()},
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
    if (!watched.filter.empty())
        json["filter"] = printable(fmt::format("{}", fmt::join(watched.filter, " ")));
    if (nothing_matched(diagnosis, watched))
        for (const Elsewhere& elsewhere : watched.elsewhere)
            json["elsewhere"].push_back(elsewhere_json(elsewhere));
    if (watched.fleet)
        json["fleet"] = {
            {"hosts", watched.fleet->hosts}, {"silent", watched.fleet->silent}, {"ended", watched.fleet->ended}};
    for (const CaptureSeen& capture : watched.captures)
        json["captures"].push_back(capture_json(capture));
    return json;
}

} // namespace finrace
