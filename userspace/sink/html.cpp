// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/html.h"

#include <algorithm>
#include <set>
#include <vector>

#include <fmt/format.h>

#include "core/cause.h"
#include "sink/clock.h"
#include "sink/facts.h"
#include "sink/markup.h"
#include "sink/picture.h"
#include "sink/report.h"
#include "sink/text.h"

namespace finrace {

namespace {

/// Text has a contrast of 4.5 and more to what it is written on, lines and areas that tell something 3 and more, in
/// both schemes (WCAG 2.2, 1.4.3 and 1.4.11): tests/check_page.py reckons it from these very values.
constexpr std::string_view sheet = R"(:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7f9; --ink: #1a2027; --soft: #535e6a; --rule: #d5dbe1; --faint: #7a8591;
  --blue: #1f5fbf; --amber: #8f4d00; --red: #b3261e; --green: #1c6b3a; --on: #ffffff;
  --blue-area: #dbe7f9; --amber-area: #fbe9d2; --red-area: #fbe3e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #11161c; --panel: #1a2129; --ink: #e7ebef; --soft: #a6b1bd; --rule: #313b46; --faint: #75818e;
    --blue: #85b4ff; --amber: #f2b866; --red: #ff938a; --green: #7fd6a0; --on: #11161c;
    --blue-area: #1d3354; --amber-area: #46320f; --red-area: #4d2321;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 60rem; padding: 1.75rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
}
h1, h2, h3 { line-height: 1.25; margin: 0; font-weight: 650; text-wrap: balance; }
h1 { font-size: 1.6rem; margin: .35rem 0 .6rem; }
h2 { font-size: 1.25rem; }
h3 { font-size: 1.05rem; }
p { margin: .45rem 0; max-width: 46rem; }
code { font: .92em/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
a { color: var(--blue); }
.soft, .subject, figcaption, footer { color: var(--soft); }
.state {
  display: inline-block; padding: .1rem .6rem; border: 1.5px solid; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; white-space: nowrap;
}
.bad { color: var(--red); }
.unsure { color: var(--amber); }
.good { color: var(--green); }
.warning { border-left: 4px solid var(--amber); padding: .3rem .8rem; background: var(--panel); }
section { margin-top: 2.5rem; }
nav ol { margin: 1rem 0; padding-left: 1.5rem; }
.finding, .pool { border: 1px solid var(--rule); border-radius: .6rem; padding: 1.1rem 1.25rem; margin-top: 1.25rem; }
.title { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; }
.lead { font-size: 1.1rem; font-weight: 600; margin: .3rem 0 .6rem; }
figure { margin: 1.1rem 0; padding: 1rem; background: var(--panel); border-radius: .5rem; }
figcaption { font-size: .9rem; }
figure .soft { font-size: .9rem; }
figcaption .verdict { color: var(--ink); font-weight: 600; }
.said { font-weight: 600; margin-bottom: 0; }
.sequence-steps { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.sequence-steps li { padding: .3rem 0; border-top: 1px solid var(--rule); }
.sequence-steps .when { font-variant-numeric: tabular-nums; color: var(--soft); white-space: nowrap; margin-right: .5rem; }
.sequence-steps .what { font-weight: 650; margin-right: .35rem; }
svg { display: block; overflow: visible; font-family: inherit; fill: var(--ink); }
.sequence { width: 100%; max-width: 375px; margin: .9rem 0; }
.sequence text { font-size: 10.5px; }
.sequence .role { fill: var(--soft); }
.sequence .name { font-weight: 650; font-size: 11.5px; }
.sequence .time { fill: var(--soft); font-variant-numeric: tabular-nums; }
.sequence .address { font-size: 10px; }
.lifeline { stroke: var(--faint); stroke-width: 1.5; }
.arrow { stroke-width: 1.8; }
.arrow.request, rect.label.request { stroke: var(--blue); }
.head.request { fill: var(--blue); }
.arrow.fin, rect.label.fin { stroke: var(--amber); }
.head.fin { fill: var(--amber); }
.arrow.reset, rect.label.reset { stroke: var(--red); }
.arrow.reset { stroke-dasharray: 5 3.5; }
.head.reset { fill: var(--red); }
.label { fill: var(--panel); stroke-width: 1.2; }
rect.label.none { stroke: var(--faint); }
rect.label.reset { fill: var(--red); }
text.label { fill: var(--ink); stroke: none; font-weight: 600; }
text.label.reset { fill: var(--on); }
.point { fill: var(--faint); }
.sequence rect.rest { fill: var(--blue-area); stroke: var(--blue); stroke-width: 1; }
.sequence rect.timer { fill: var(--amber-area); stroke: var(--amber); stroke-width: 1; stroke-dasharray: 3 2; }
.sequence text.timer { fill: var(--amber); }
.crossing { fill: none; stroke: var(--red); stroke-width: 2.2; }
.idle { width: 100%; overflow: hidden; }
.idle text { font-size: 12px; }
.idle .lane { fill: var(--ink); }
.idle .tick { fill: var(--soft); font-size: 11.5px; }
.idle .axis { stroke: var(--faint); stroke-width: 1.5; }
.idle .grid { stroke: var(--rule); stroke-width: 1; }
.idle .own, .idle rect.rest { fill: var(--blue); }
.idle .own-unknown { stroke: var(--blue); stroke-width: 2; stroke-dasharray: 2 5; }
.idle .own-end { stroke: var(--blue); stroke-width: 2.5; }
.idle .seen { stroke-dasharray: 2 2; }
.idle .danger { fill: var(--red-area); }
.idle .spread { fill: var(--amber-area); }
.idle .closed { fill: var(--amber-area); stroke: var(--amber); stroke-width: 1; }
.idle .timer { stroke: var(--amber); stroke-width: 2; stroke-dasharray: 6 3; }
.idle .close { fill: var(--amber); stroke: var(--panel); stroke-width: .8; }
.idle .dies { stroke: var(--red); stroke-width: 1; }
.idle .count { font-size: 11px; fill: var(--soft); stroke: var(--panel); stroke-width: 3; paint-order: stroke; }
.idle text.dies { fill: var(--red); stroke: var(--red-area); stroke-width: 3; paint-order: stroke; font-weight: 650; }
.hatch-ground { fill: var(--red-area); }
.hatch { fill: var(--red); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .5rem 0; padding: 0; font-size: .85rem; }
.legend li { display: flex; align-items: baseline; gap: .4rem; }
.legend span { flex: none; }
.legend .key-unknown { align-self: center; }
.key-rest { width: .8rem; height: .8rem; background: var(--blue); }
.key-dies {
  width: .8rem; height: .8rem; border: 1px solid var(--red);
  background: repeating-linear-gradient(45deg, var(--red) 0 2px, var(--red-area) 2px 5px);
}
.key-unknown { width: 1.1rem; height: 0; border-top: 2px dotted var(--blue); }
.key-close { width: .6rem; height: .6rem; border-radius: 50%; background: var(--amber); }
.key-timer { width: 0; height: .9rem; border-left: 2px dashed var(--amber); }
.remedy { margin: .8rem 0; }
.remedy ul { margin: .3rem 0; padding-left: 1.1rem; }
.remedy li { margin: .25rem 0; }
.remedy code { display: inline-block; max-width: 100%; padding: .12em .4em; background: var(--panel); border: 1px solid var(--rule); border-radius: .3em; font-weight: 600; }
h3 + .remedy, h3 + p { margin-top: .4rem; }
.change { margin-top: 1.2rem; }
details { font-size: .9rem; margin-top: .6rem; }
summary { cursor: pointer; color: var(--blue); }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--rule); font-weight: inherit; vertical-align: top; }
thead th { color: var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; font-size: .85rem; }
@media (min-width: 56rem) {
  .steps { display: grid; grid-template-columns: 375px 1fr; column-gap: 1.5rem; }
  .sequence { width: 375px; }
  .sequence-steps { position: relative; margin-top: .9rem; }
  .sequence-steps li { position: absolute; top: calc(var(--y) * 1.25px - .75rem); padding: 0; border: 0; line-height: 1.4; }
}
@media (max-width: 30rem) {
  body { padding: 1rem .75rem 2rem; }
  h1 { font-size: 1.3rem; }
  .finding, .pool { padding: .8rem .75rem; }
  figure { padding: .75rem .6rem; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --panel: #ffffff; --ink: #000000; --soft: #444444; --rule: #bbbbbb; --faint: #777777;
    --blue: #1f5fbf; --amber: #8f4d00; --red: #b3261e; --green: #1c6b3a; --on: #ffffff;
    --blue-area: #dbe7f9; --amber-area: #fbe9d2; --red-area: #fbe3e1;
  }
  body { font-size: 10.5pt; max-width: none; padding: 0; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure { padding: .3rem 0; }
  .steps { display: grid; grid-template-columns: 270px 1fr; column-gap: 1rem; align-items: start; }
  figure, .remedy { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
)";

void add_paragraphs(Markup& page, const std::vector<std::string>& paragraphs)
{
    for (const std::string& one : paragraphs)
        page.element("p", {}, one);
}

std::string_view mood_of(PoolState state)
{
    switch (state) {
    case PoolState::exposed:
        return "bad";
    case PoolState::unknown:
    case PoolState::kept_clear:
        return "unsure";
    case PoolState::safe:
    case PoolState::not_reused:
        break;
    }
    return "good";
}

std::string_view mood_of(Diagnosis::State state)
{
    switch (state) {
    case Diagnosis::State::findings:
    case Diagnosis::State::exposed:
        return "bad";
    case Diagnosis::State::inconclusive:
        return "unsure";
    case Diagnosis::State::healthy:
        break;
    }
    return "good";
}

void add_remedies(Markup& page, const Pool& pool)
{
    bool first = true;
    for (const Remedy& way : remedies_of(pool)) {
        page.open("div", {{"class", "remedy"}}).element("p", {}, remedy_text(way, first));
        first = false;
        if (!way.settings.empty()) {
            page.open("ul");
            for (const Remedy::Setting& setting : way.settings) {
                page.open("li").text(setting.software).text(": ").element("code", {}, setting.text);
                if (!setting.note.empty())
                    page.text(" ").element("span", {{"class", "soft"}}, fmt::format("({})", setting.note));
                for (const Present& present : setting.present)
                    page.element("p", {{"class", "soft"}}, present_text(present));
                page.element("p", {{"class", "soft"}}, fmt::format("Source: {}", setting.source));
                page.close();
            }
            page.close();
        }
        page.close();
    }
}

/// The steps in words, each at its arrow's height where there is room beside the picture.
void add_steps(Markup& page, const Sighting& sighting, const SequenceDiagram& diagram)
{
    const std::vector<Moment> moments = moments_of(sighting);
    page.open("ol", {{"class", "sequence-steps"}});
    for (std::size_t i = 0; i < moments.size(); ++i) {
        const Moment& moment = moments[i];
        page.open("li", {{"style", fmt::format("--y: {:.1f}", diagram.at[i])}});
        page.element("span", {{"class", "when"}},
                     moment.rest ? fmt::format("{:+.0f} ms", moment.ms) : fmt::format("{:+.3f} ms", moment.ms));
        page.text(" ").element("span", {{"class", "what"}}, moment.what).text(" ").text(moment.shows).close();
    }
    page.close();
}

void add_sequence(Markup& page, const Sighting& sighting, const WallClock& clock, std::size_t number)
{
    const Verdict& verdict = sighting.verdict;
    page.open("figure").open("figcaption");
    page.open("p").element(
        "span", {{"class", "verdict"}},
        fmt::format("{}{}, {}{}", to_string(verdict.cause),
                    verdict.variant == Variant::none ? "" : fmt::format(" ({})", to_string(verdict.variant)),
                    to_string(verdict.certainty), verdict.incomplete ? ", incomplete" : ""));
    if (verdict.reason && *verdict.reason != Reason::unknown)
        page.text(fmt::format(", {}", to_string(*verdict.reason)));
    page.text(", ").element("time", {{"datetime", clock.rfc3339(sighting.judged.timestamp_ns)}},
                            clock.day_and_time(sighting.judged.timestamp_ns));
    page.close().element("p", {}, whereabouts(sighting)).close();
    const SequenceDiagram diagram = sequence_diagram(sighting, fmt::format("sequence-{}", number));
    if (diagram.height > 0) {
        page.open("div", {{"class", "steps"}}).add(diagram.svg);
        add_steps(page, sighting, diagram);
        page.close();
    }
    page.element("p", {{"class", "said"}}, printable(verdict.message));
    if (const std::string outcome = outcome_text(sighting.outcome); !outcome.empty())
        page.element("p", {}, outcome);
    if (diagram.height > 0)
        page.element(
            "p", {{"class", "soft"}},
            sighting.judged.srtt_us > 0
                ? fmt::format("Time runs down, not to scale. Arrows slant by half the round trip of {:.3f} ms.",
                              sighting.judged.srtt_us / 1e3)
                : "Time runs down, not to scale. The round trip is not known.");
    page.close();
}

void add_finding(Markup& page, const Diagnosis& diagnosis, const Watched& watched, const Places& places,
                 const Finding& finding, std::size_t number)
{
    page.open("article", {{"class", "finding"}, {"id", fmt::format("finding-{}", number)}});
    page.open("div", {{"class", "title"}}).open("h2").text(fmt::format("{}. ", number));
    page.element("code", {{"class", "bad"}}, to_string(finding.cause)).text(" ");
    page.element("span", {}, places.name(finding.where)).close().close();
    page.element("p", {{"class", "lead"}}, affected_text(finding));
    page.element("p", {}, why_text(finding));
    if (!finding.server_side)
        page.element("p", {}, clients_text(finding, watched));
    if (const std::string waits = waits_text(finding); !waits.empty())
        page.element("p", {}, waits);
    if (const std::string hosts = hosts_text(finding); !hosts.empty())
        page.element("p", {}, hosts);
    page.element("p", {}, times_text(finding));
    add_sequence(page, sighting_of(diagnosis, finding), WallClock(finding.instance.clock_offset_ns), number);
    page.element("h3", {{"class", "change"}}, "What to change");
    const Pool* to_set = pool_to_set(diagnosis, finding);
    if (to_set != nullptr) {
        page.element("p", {}, limits_text(places, *to_set));
        add_remedies(page, *to_set);
    }
    for (const std::string& hint : hints(diagnosis, watched, finding))
        page.element("p", {}, hint);
    page.close();
}

void add_idle_times(Markup& page, const Places& places, const Pool& pool, std::size_t number)
{
    const std::string name = name_text(places, pool);
    const IdlePicture picture = idle_picture(pool, name, fmt::format("idle-{}", number));
    const bool knows_timer = pool.upstream.idle_timeout.timeout().has_value();
    page.open("figure").add(picture.svg);
    page.open("figcaption").open("ul", {{"class", "legend"}});
    const auto key = [&page](std::string_view kind, std::string_view text) {
        page.open("li").element("span", {{"class", fmt::format("key-{}", kind)}}, "").text(text).close();
    };
    key("rest", "connections, by their longest rest before a request");
    if (picture.may_go_on)
        key("unknown", "no limit of this host's own seen");
    if (picture.some_die)
        key("dies", "reach the upstream's close");
    if (knows_timer)
        key("timer", "the upstream's timer, and its spread");
    if (pool.upstream.idle_timeout.samples() > 0)
        key("close", "an idle close by the upstream");
    page.close().element("p", {}, picture.sentence).close();
    if (const auto rests = pool.upstream.rests.filled(); !rests.empty()) {
        page.open("details").element("summary", {}, "The numbers").open("table").open("thead").open("tr");
        page.element("th", {{"scope", "col"}}, "longest rest")
            .element("th", {{"class", "number"}, {"scope", "col"}}, "connections");
        page.close().close().open("tbody");
        for (const RestHistogram::Bucket& bucket : rests) {
            page.open("tr").element(
                "th", {{"scope", "row"}},
                fmt::format("{} to {}", duration_text(bucket.from_ms), duration_text(bucket.to_ms)));
            page.element("td", {{"class", "number"}}, std::to_string(bucket.count)).close();
        }
        page.close().close().close();
    }
    page.close();
}

void add_pool(Markup& page, const Places& places, const Pool& pool, std::size_t number, bool told)
{
    const PoolState state = pool.exposure.state;
    page.open("article", {{"class", "pool"}, {"id", fmt::format("pool-{}", number)}});
    page.open("div", {{"class", "title"}}).element("h3", {}, name_text(places, pool));
    page.element("span", {{"class", fmt::format("state {}", mood_of(state))}}, to_string(state));
    page.element("span", {{"class", "soft"}}, traffic_text(pool)).close();
    add_paragraphs(page, pool_text(places, pool));
    if (!pool.other && has_idle_times(pool))
        add_idle_times(page, places, pool, number);
    if (state == PoolState::exposed && !pool.other && !told) {
        page.element("h3", {{"class", "change"}}, "Before a request dies");
        add_remedies(page, pool);
    }
    page.close();
}

/// A line for each of those that are shown, which leads to it.
void add_index(Markup& page, const std::vector<const Finding*>& findings, const Places& places)
{
    page.open("nav", {{"aria-label", "Findings"}}).open("ol");
    for (std::size_t i = 0; i < std::min(findings.size(), most_shown); ++i) {
        const Finding& finding = *findings[i];
        page.open("li").element("a", {{"href", fmt::format("#finding-{}", i + 1)}}, to_string(finding.cause));
        page.text(fmt::format(" {}: {}", places.name(finding.where), affected_text(finding))).close();
    }
    page.close().close();
}

/// What is left, a line each.
void add_more_findings(Markup& page, const Diagnosis& diagnosis, const Places& places)
{
    const std::vector<const Finding*> findings = diagnosis.findings();
    if (findings.size() > most_shown) {
        page.open("details").element("summary", {},
                                     fmt::format("And {} more", counted(findings.size() - most_shown, "finding")));
        page.open("table").open("tbody");
        for (std::size_t i = most_shown; i < findings.size(); ++i) {
            page.open("tr").element("td", {}, to_string(findings[i]->cause));
            page.element("td", {}, places.name(findings[i]->where));
            page.element("td", {}, affected_text(*findings[i])).close();
        }
        page.close().close().close();
    }
    if (diagnosis.more_failures() > 0)
        page.element("p", {}, fmt::format("{} failures elsewhere are counted alone.", diagnosis.more_failures()));
}

void add_pools(Markup& page, const Diagnosis& diagnosis, const Places& places, const std::set<const Pool*>& told)
{
    const std::vector<const Pool*> pools = diagnosis.pools();
    if (pools.empty())
        return;
    page.open("section", {{"id", "upstreams"}}).element("h2", {}, "Upstreams");
    for (std::size_t i = 0; i < std::min(pools.size(), most_shown); ++i)
        add_pool(page, places, *pools[i], i + 1, told.count(pools[i]) != 0);
    if (pools.size() > most_shown) {
        page.open("details").element("summary", {}, fmt::format("And {} more", pools.size() - most_shown));
        page.open("table").open("tbody");
        for (std::size_t i = most_shown; i < pools.size(); ++i) {
            page.open("tr").element("td", {}, name_text(places, *pools[i]));
            page.element("td", {}, to_string(pools[i]->exposure.state));
            page.element("td", {}, traffic_text(*pools[i])).close();
        }
        page.close().close().close();
    }
    page.close();
}

} // namespace

std::string report_html(const Diagnosis& diagnosis, const Watched& watched)
{
    const Places places(diagnosis);
    const std::string concluded = conclusion(diagnosis, watched, places);
    const Diagnosis::State state = diagnosis.state(watched.is_partial());
    Markup page;
    page.open("html", {{"lang", "en"}}).open("head");
    page.leaf("meta", {{"charset", "utf-8"}});
    page.leaf("meta", {{"http-equiv", "Content-Security-Policy"},
                       {"content", "default-src 'none'; style-src 'unsafe-inline'"}});
    page.leaf("meta", {{"name", "viewport"}, {"content", "width=device-width, initial-scale=1"}});
    page.leaf("meta", {{"name", "referrer"}, {"content", "no-referrer"}});
    page.element("title", {},
                 fmt::format("finrace{}: {}", watched.host_name.empty() ? "" : " on " + printable(watched.host_name),
                             concluded));
    page.style(sheet).close();

    page.open("body").open("header");
    page.element("span", {{"class", fmt::format("state {}", mood_of(state))}}, to_string(state));
    page.element("h1", {}, concluded).element("p", {{"class", "subject"}}, subject_text(diagnosis, watched));
    if (const std::string lost = lost_text(watched); !lost.empty())
        page.element("p", {{"class", "warning"}}, lost);
    for (const std::string& caveat : caveats(diagnosis, watched))
        page.element("p", {{"class", "warning"}}, caveat);
    page.close().open("main");

    std::set<const Pool*> told;
    const std::vector<const Finding*> findings = diagnosis.findings();
    if (findings.size() > 1)
        add_index(page, findings, places);
    for (std::size_t i = 0; i < std::min(findings.size(), most_shown); ++i) {
        add_finding(page, diagnosis, watched, places, *findings[i], i + 1);
        told.insert(pool_to_set(diagnosis, *findings[i]));
    }
    add_more_findings(page, diagnosis, places);
    add_pools(page, diagnosis, places, told);
    page.close();
    page.element("footer", {},
                 fmt::format("{} Times of day are of the time zone in which this page was made. finrace diagnose made "
                             "it; it loads nothing and runs nothing.",
                             certainties));
    return "<!DOCTYPE html>\n" + page.take();
}

} // namespace finrace
