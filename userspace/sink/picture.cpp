// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/picture.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "sink/facts.h"
#include "sink/sentences.h"
#include "sink/text.h"

namespace finrace {

namespace {

using Way = Moment::Way;
using Left = Moment::Left;

std::string number(double value)
{
    return fmt::format("{:.1f}", value);
}

Markup titled(std::string_view id, Markup::Attribute size, Markup::Attribute view, std::string_view title,
              std::string_view description)
{
    Markup svg;
    svg.open("svg", {std::move(size),
                     std::move(view),
                     {"role", "img"},
                     {"aria-labelledby", fmt::format("{0}-title {0}-text", id)}});
    svg.element("title", {{"id", fmt::format("{}-title", id)}}, title);
    svg.element("desc", {{"id", fmt::format("{}-text", id)}}, description);
    return svg;
}

// ---- the sequence diagram

constexpr double local_x = 80;
constexpr double peer_x = 222;
constexpr double label_share = 0.26; ///< of an arrow, from its tail
constexpr double head_line = 12;
constexpr std::size_t head_columns = 22;

/// A moment at one of the two ends.
struct Mark {
    std::size_t moment;
    bool here;
    double ms;
    double y;
};

struct Line {
    double from_x;
    double from_y;
    double to_x;
    double to_y;
};

/// When each segment left, or reached, the peer.
std::vector<double> times_at_peer(const std::vector<Moment>& moments, double one_way_ms)
{
    // When the request arrived there. What answers it came after that, what does not acknowledge it left before: where
    // the measured round trip says otherwise, the sequence numbers are right.
    double arrival = one_way_ms;
    for (const Moment& moment : moments)
        if (moment.left == Left::after_request && moment.ms > 0)
            arrival = std::min(arrival, moment.ms / 2);
    for (const Moment& moment : moments)
        if (moment.left == Left::before_request && moment.ms > 0 && moment.ms - one_way_ms >= arrival)
            arrival = moment.ms * 0.6;
    std::vector<double> times;
    for (const Moment& moment : moments) {
        double at = moment.ms;
        if (moment.way == Way::to_peer)
            at = moment.ms == 0 ? arrival : moment.ms + one_way_ms;
        else if (moment.way == Way::to_local)
            at = moment.ms - one_way_ms;
        if (moment.left == Left::before_request)
            at = std::min(at, arrival * 0.6);
        else if (moment.left == Left::after_request)
            at = std::min(std::max(at, arrival), moment.ms);
        times.push_back(at);
    }
    return times;
}

/// In the order of time, and so far apart that there is room for what is written at this host's; returns their end.
double place(std::vector<Mark>& marks, const std::vector<Moment>& moments, double one_way_ms, double top)
{
    constexpr double closest = 13;
    constexpr double farthest = 84;
    constexpr double slant = 62;
    constexpr double row = 30;
    constexpr double row_that_shows = 48;
    std::stable_sort(marks.begin(), marks.end(), [](const Mark& one, const Mark& other) { return one.ms < other.ms; });
    const double per_ms = slant / std::max(one_way_ms, 1e-3);
    double y = top;
    double free_here = top;
    for (std::size_t i = 0; i < marks.size(); ++i) {
        const double gap_ms = i > 0 ? marks[i].ms - marks[i - 1].ms : 0;
        y += gap_ms > 0 ? std::clamp(gap_ms * per_ms, closest, farthest) : 0;
        if (marks[i].here) {
            y = std::max(y, free_here);
            free_here = y + (moments[marks[i].moment].shows.empty() ? row : row_that_shows);
        }
        marks[i].y = y;
    }
    return std::max(y, free_here - row) + 24;
}

/// An end's name and address, at the head of its lifeline; returns where it ends.
double draw_head(Markup& svg, double x, std::string_view role, const std::string& name, std::string address)
{
    double y = head_line;
    const auto line = [&](std::string_view kind, std::string_view text) {
        svg.element("text",
                    {{"x", number(x)}, {"y", number(y)}, {"text-anchor", "middle"}, {"class", std::string(kind)}},
                    text);
        y += head_line;
    };
    line("role", role);
    if (!name.empty())
        line("name", name);
    for (; address.size() > head_columns;) { // IPv6
        const std::size_t colon = address.rfind(':', head_columns - 1);
        const std::size_t end = colon == std::string::npos || colon == 0 ? head_columns : colon + 1;
        line("address", address.substr(0, end));
        address.erase(0, end);
    }
    line("address", address);
    return y;
}

/// "request", "fin", "reset" or "none": how a moment is drawn.
std::string kind_of(const Moment& moment)
{
    if (moment.way == Way::none)
        return "none";
    return moment.what == "FIN" ? "fin" : moment.what == "RST" ? "reset" : "request";
}

void draw_arrow(Markup& svg, const Line& line, const std::string& kind)
{
    constexpr double length = 9;
    constexpr double half_width = 4;
    const double width = line.to_x - line.from_x;
    const double height = line.to_y - line.from_y;
    const double all = std::hypot(width, height);
    const double dx = width / all;
    const double dy = height / all;
    const double base_x = line.to_x - length * dx;
    const double base_y = line.to_y - length * dy;
    svg.leaf("line", {{"x1", number(line.from_x)},
                      {"y1", number(line.from_y)},
                      {"x2", number(base_x)},
                      {"y2", number(base_y)},
                      {"class", "arrow " + kind}});
    svg.leaf("polygon", {{"points", fmt::format("{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}", line.to_x, line.to_y,
                                                base_x - half_width * dy, base_y + half_width * dx,
                                                base_x + half_width * dy, base_y - half_width * dx)},
                         {"class", "head " + kind}});
}

void draw_label(Markup& svg, double x, double y, const std::string& text, const std::string& kind)
{
    const double width = 6.3 * static_cast<double>(text.size()) + 10;
    svg.leaf("rect", {{"x", number(x - width / 2)},
                      {"y", number(y - 8)},
                      {"width", number(width)},
                      {"height", "16"},
                      {"rx", "8"},
                      {"class", "label " + kind}});
    svg.element("text",
                {{"x", number(x)}, {"y", number(y + 3.8)}, {"text-anchor", "middle"}, {"class", "label " + kind}},
                text);
}

/// In the left margin, short.
std::string margin_time(const Moment& moment)
{
    const double ms = moment.ms;
    if (moment.rest)
        return std::abs(ms) < 10'000 ? fmt::format("{:+.0f} ms", ms) : fmt::format("{:+.1f} s", ms / 1e3);
    return std::abs(ms) < 1000 ? fmt::format("{:+.3f} ms", ms) : fmt::format("{:+.3f} s", ms / 1e3);
}

std::string in_words(const Sighting& sighting, const std::vector<Moment>& moments)
{
    const std::string_view peer = is_client(sighting.judged) ? "upstream" : "client";
    std::string text;
    for (const Moment& moment : moments) {
        const std::string way = moment.way == Way::to_peer    ? fmt::format(" to the {}", peer)
                                : moment.way == Way::to_local ? fmt::format(" from the {}", peer)
                                                              : "";
        text += fmt::format("{}{}: {}{}{}{}.", text.empty() ? "" : " ", margin_time(moment), moment.what, way,
                            moment.shows.empty() ? "" : ", ", moment.shows);
    }
    return text;
}

/// At which share of the request's way what comes from the peer crosses it; 0 if it does not.
double crossing_of(const Line& request, const Line& other)
{
    const double here = other.to_y - request.from_y;  // it reached this host after the request had left
    const double there = request.to_y - other.from_y; // and left the peer before that arrived
    return here > 0 && there > 0 ? here / (here + there) : 0;
}

// ---- idle times

/// Milliseconds to per cent of the picture's width, by their logarithm.
class Scale {
public:
    Scale(double lowest_ms, double highest_ms) : low_(std::log(lowest_ms)), high_(std::log(highest_ms)) {}
    [[nodiscard]] double percent(double ms) const
    {
        return std::clamp((std::log(std::max(ms, 0.5)) - low_) / (high_ - low_) * 100, 0.0, 100.0);
    }
    [[nodiscard]] double decades() const { return (high_ - low_) / std::log(10); }

private:
    double low_;
    double high_;
};

std::string at(double percent)
{
    return fmt::format("{:.2f}%", percent);
}

void draw_bar(Markup& svg, double from, double to, double y, double height, const std::string& kind)
{
    svg.leaf("rect", {{"x", at(from)},
                      {"y", number(y)},
                      {"width", at(std::max(0.0, to - from))},
                      {"height", number(height)},
                      {"class", kind}});
}

void draw_upright(Markup& svg, double percent, double from_y, double to_y, const std::string& kind)
{
    svg.leaf("line",
             {{"x1", at(percent)}, {"x2", at(percent)}, {"y1", number(from_y)}, {"y2", number(to_y)}, {"class", kind}});
}

std::string tick_text(std::uint64_t ms)
{
    if (ms < 1000)
        return fmt::format("{} ms", ms);
    if (ms < 60'000)
        return fmt::format("{} s", ms / 1000);
    return ms < 3'600'000 ? fmt::format("{} min", ms / 60'000) : fmt::format("{} h", ms / 3'600'000);
}

void draw_axis(Markup& svg, const Scale& scale, double base, double top)
{
    constexpr std::array<std::uint64_t, 10> coarse{1,      10,      100,       1000,       10'000,
                                                   60'000, 600'000, 3'600'000, 36'000'000, 360'000'000};
    constexpr std::array<std::uint64_t, 24> fine{1,         2,         5,         10,         20,         50,
                                                 100,       200,       500,       1000,       2000,       5000,
                                                 10'000,    20'000,    60'000,    120'000,    300'000,    600'000,
                                                 1'200'000, 3'600'000, 7'200'000, 18'000'000, 36'000'000, 86'400'000};
    constexpr double widest_fine = 2.2;
    constexpr double margin = 9; // per cent, for half a tick's text
    svg.leaf("line", {{"x1", "0"}, {"x2", "100%"}, {"y1", number(base)}, {"y2", number(base)}, {"class", "axis"}});
    const auto tick = [&](std::uint64_t ms) {
        const double percent = scale.percent(static_cast<double>(ms));
        if (percent < margin || percent > 100 - margin)
            return;
        draw_upright(svg, percent, top, base, "grid");
        draw_upright(svg, percent, base, base + 5, "axis");
        svg.element("text",
                    {{"x", at(percent)}, {"y", number(base + 18)}, {"text-anchor", "middle"}, {"class", "tick"}},
                    tick_text(ms));
    };
    if (scale.decades() > widest_fine)
        std::for_each(coarse.begin(), coarse.end(), tick);
    else
        std::for_each(fine.begin(), fine.end(), tick);
}

Scale scale_of(const Pool& pool)
{
    double lowest = std::numeric_limits<double>::max();
    double highest = 1;
    const auto note = [&](double ms) {
        lowest = std::min(lowest, std::max(ms, 1.0));
        highest = std::max(highest, ms);
    };
    for (const RestHistogram::Bucket& bucket : pool.upstream.rests.filled()) {
        note(static_cast<double>(bucket.from_ms));
        note(static_cast<double>(bucket.to_ms));
    }
    for (const std::uint32_t ms : pool.upstream.idle_timeout.idle_times_ms())
        note(ms);
    for (const IdleTimeoutLearner* learner : {&pool.upstream.idle_timeout, &pool.upstream.own_idle_limit})
        if (const auto timeout = learner->timeout()) {
            note(timeout->lowest_ms);
            note(timeout->highest_ms);
        }
    highest *= 1.4;
    return {std::min(lowest / 1.2, highest / 10), highest};
}

/// Until when this host uses connections again, and whether it closes them then.
struct OwnEnd {
    double ms;
    bool closes;
};

OwnEnd own_end(const Pool& pool)
{
    if (const auto own = pool.upstream.own_idle_limit.timeout();
        own && own->highest_ms >= pool.upstream.longest_reused_idle_ms)
        return {.ms = static_cast<double>(own->ms), .closes = true};
    return {.ms = static_cast<double>(pool.upstream.longest_reused_idle_ms), .closes = false};
}

/// Idle time before a request from which on it dies. The upstream's timeout must be known.
double danger_from_ms(const Pool& pool)
{
    return pool.upstream.idle_timeout.timeout()->lowest_ms - pool.exposure.window_ms;
}

// From the top: this host's lane, the upstream's, and the histogram.
constexpr double own_y = 22;
constexpr double upstream_y = 62;
constexpr double lane = 12;
constexpr double top = 98;
constexpr double base = 202;
constexpr double idle_height = 244;

/// Until when this host uses connections again, and the part of it that lies behind the upstream's close.
void draw_own_lane(Markup& svg, const OwnEnd& own, std::string_view text, const Scale& scale, double closed_at,
                   const std::string& hatch)
{
    const double own_at = scale.percent(own.ms);
    svg.element("text", {{"x", "0"}, {"y", number(own_y - 7)}, {"class", "lane"}}, text);
    draw_bar(svg, 0, own_at, own_y, lane, "own");
    if (!own.closes)
        svg.leaf("line", {{"x1", at(own_at)},
                          {"x2", "100%"},
                          {"y1", number(own_y + lane / 2)},
                          {"y2", number(own_y + lane / 2)},
                          {"class", "own-unknown"}});
    if (own_at > closed_at)
        svg.leaf("rect", {{"x", at(closed_at)},
                          {"y", number(own_y)},
                          {"width", at(own_at - closed_at)},
                          {"height", number(lane)},
                          {"fill", fmt::format("url(#{})", hatch)}});
    draw_upright(svg, own_at, own_y - 3, own_y + lane + 3, own.closes ? "own-end" : "own-end seen");
}

/// From when on the upstream closes, and each close that is known.
void draw_upstream_lane(Markup& svg, const Pool& pool, std::string_view text, const Scale& scale)
{
    const auto timeout = pool.upstream.idle_timeout.timeout();
    svg.element("text", {{"x", "0"}, {"y", number(upstream_y - 7)}, {"class", "lane"}}, text);
    svg.leaf("line", {{"x1", "0"},
                      {"x2", "100%"},
                      {"y1", number(upstream_y + lane / 2)},
                      {"y2", number(upstream_y + lane / 2)},
                      {"class", "grid"}});
    if (timeout) {
        draw_bar(svg, scale.percent(timeout->lowest_ms), 100, upstream_y, lane, "closed");
        draw_upright(svg, scale.percent(timeout->ms), upstream_y - 3, base, "timer");
    }
    for (const std::uint32_t ms : pool.upstream.idle_timeout.idle_times_ms())
        svg.leaf(
            "circle",
            {{"cx", at(scale.percent(ms))}, {"cy", number(upstream_y + lane / 2)}, {"r", "3.5"}, {"class", "close"}});
}

/// Whether any of them lie where requests die.
bool draw_rests(Markup& svg, const Pool& pool, const Scale& scale, const std::string& hatch)
{
    const bool knows_timer = pool.upstream.idle_timeout.timeout().has_value();
    const std::vector<RestHistogram::Bucket> rests = pool.upstream.rests.filled();
    const auto dies = [&](const RestHistogram::Bucket& bucket) {
        return knows_timer && static_cast<double>(bucket.to_ms) > danger_from_ms(pool);
    };
    std::uint32_t most = 0;
    std::uint32_t most_that_die = 0;
    for (const RestHistogram::Bucket& bucket : rests) {
        most = std::max(most, bucket.count);
        most_that_die = std::max(most_that_die, dies(bucket) ? bucket.count : 0);
    }
    for (const RestHistogram::Bucket& bucket : rests) {
        constexpr double lowest = 4; // a single one is seen beside a thousand
        constexpr double room = 18;  // for a count
        const double from = scale.percent(static_cast<double>(bucket.from_ms));
        const double to = scale.percent(static_cast<double>(bucket.to_ms));
        const double tall = std::max(lowest, (base - top - room) * bucket.count / most);
        const double gap = std::min(0.15, (to - from) / 8);
        if (dies(bucket))
            svg.leaf("rect", {{"x", at(from + gap)},
                              {"y", number(base - tall)},
                              {"width", at(to - from - 2 * gap)},
                              {"height", number(tall)},
                              {"class", "dies"},
                              {"fill", fmt::format("url(#{})", hatch)}});
        else
            draw_bar(svg, from + gap, to - gap, base - tall, tall, "rest");
        // Not on each: they are narrow, and the numbers are in the table.
        if (bucket.count == (dies(bucket) ? most_that_die : most))
            svg.element("text",
                        {{"x", at((from + to) / 2)},
                         {"y", number(base - tall - 5)},
                         {"text-anchor", "middle"},
                         {"class", dies(bucket) ? "count dies" : "count"}},
                        std::to_string(bucket.count));
    }
    return most_that_die > 0;
}

/// Of an upstream whose timeout has not been learned.
std::string unknown_close(const Pool& pool)
{
    const bool closed =
        pool.upstream.counts.idle_closes_by_peer > 0 || pool.upstream.idle_timeout.samples() > 0 || pool.races > 0;
    return closed ? "when it closes is not known" : "has closed none at rest";
}

std::string idle_sentence(const Pool& pool, std::string_view name)
{
    const auto timeout = pool.upstream.idle_timeout.timeout();
    const std::uint64_t all = pool.upstream.rests.count();
    if (!timeout)
        return fmt::format("Used again: {} to {}. The upstream: {}.", counted(all, "connection"), name,
                           unknown_close(pool));
    std::uint64_t in_danger = 0;
    for (const RestHistogram::Bucket& bucket : pool.upstream.rests.filled())
        in_danger += static_cast<double>(bucket.to_ms) > danger_from_ms(pool) ? bucket.count : 0;
    return fmt::format("Of {} used again, {} in bars that reach the upstream's timer. A request that is sent less than "
                       "{:.1f} ms before the close meets it and dies.",
                       counted(all, "connection"), in_danger == 1 ? "1 lies" : fmt::format("{} lie", in_danger),
                       pool.exposure.window_ms);
}

/// The rest before the request: on this host's line until that, on the upstream's until its timer ended it.
void draw_rest(Markup& svg, const Sighting& sighting, const std::vector<Moment>& moments,
               const std::vector<double>& at_peer, const std::vector<double>& y_here, const std::vector<double>& y_peer)
{
    constexpr double width = 7;
    const auto rest = std::find_if(moments.begin(), moments.end(), [](const Moment& one) { return one.rest; });
    const auto request = std::find_if(moments.begin(), moments.end(),
                                      [](const Moment& one) { return one.way == Way::to_peer && one.ms == 0; });
    if (rest == moments.end() || request == moments.end())
        return;
    const double begin = y_here[static_cast<std::size_t>(rest - moments.begin())];
    const auto bar = [&](double x, double end, const char* kind) {
        svg.leaf("rect", {{"x", number(x - width / 2)},
                          {"y", number(begin)},
                          {"width", number(width)},
                          {"height", number(std::max(0.0, end - begin))},
                          {"class", kind}});
    };
    bar(local_x, y_here[static_cast<std::size_t>(request - moments.begin())], "rest");
    const auto close = std::find_if(moments.begin(), moments.end(), [](const Moment& one) {
        return one.way == Way::to_local &&
               (one.what == "FIN" || (one.what == "RST" && one.left == Left::before_request));
    });
    if (close == moments.end() || !sighting.idle_timeout)
        return;
    const auto index = static_cast<std::size_t>(close - moments.begin());
    const double rested_ms = at_peer[index] - rest->ms;
    if (rested_ms < 0 || sighting.idle_timeout->nearness(static_cast<std::uint64_t>(rested_ms),
                                                         sighting.judged.srtt_us / 1000) != Nearness::at)
        return;
    bar(peer_x, y_peer[index], "timer");
    const double middle = (begin + y_peer[index]) / 2;
    const std::string told = fmt::format("{} ms", sighting.idle_timeout->ms);
    for (const auto& [y, text] : {std::pair(middle - 2, std::string("its timer")), std::pair(middle + 10, told)})
        svg.element("text", {{"x", number(peer_x + 9)}, {"y", number(y)}, {"class", "timer"}}, text);
}

} // namespace

SequenceDiagram sequence_diagram(const Sighting& sighting, std::string_view id)
{
    SequenceDiagram diagram;
    const std::vector<Moment> moments = moments_of(sighting);
    if (moments.empty())
        return diagram;
    const event& e = sighting.judged;
    const bool client = is_client(e);
    const double one_way_ms = e.srtt_us / 2e3;
    const std::vector<double> at_peer = times_at_peer(moments, one_way_ms);
    std::vector<Mark> marks;
    for (std::size_t i = 0; i < moments.size(); ++i) {
        if (moments[i].way == Way::to_local)
            marks.push_back({.moment = i, .here = false, .ms = at_peer[i], .y = 0});
        marks.push_back({.moment = i, .here = true, .ms = moments[i].ms, .y = 0});
        if (moments[i].way == Way::to_peer)
            marks.push_back({.moment = i, .here = false, .ms = at_peer[i], .y = 0});
    }

    Markup heads;
    const double head_end = std::max(draw_head(heads, local_x, "this host", printable(sighting.process_name),
                                               endpoint_text(e.local_address, e.local_port, e.family)),
                                     draw_head(heads, peer_x, client ? "upstream" : "client", "",
                                               endpoint_text(e.peer_address, e.peer_port, e.family)));
    diagram.height = place(marks, moments, one_way_ms, head_end + 16);
    std::vector<double> y_here(moments.size());
    std::vector<double> y_peer(moments.size());
    for (const Mark& mark : marks)
        (mark.here ? y_here : y_peer)[mark.moment] = mark.y;
    diagram.at = y_here;

    Markup& svg = diagram.svg;
    svg = titled(id, {"class", "sequence"}, {"viewBox", fmt::format("0 0 {} {:.0f}", sequence_width, diagram.height)},
                 "Sequence diagram: " + whereabouts(sighting), in_words(sighting, moments));
    svg.add(heads);
    for (const double x : {local_x, peer_x})
        svg.leaf("line", {{"x1", number(x)},
                          {"x2", number(x)},
                          {"y1", number(head_end - 4)},
                          {"y2", number(diagram.height)},
                          {"class", "lifeline"}});

    draw_rest(svg, sighting, moments, at_peer, y_here, y_peer);
    const auto line_of = [&](std::size_t i) {
        return moments[i].way == Way::to_peer
                   ? Line{.from_x = local_x, .from_y = y_here[i], .to_x = peer_x, .to_y = y_peer[i]}
                   : Line{.from_x = peer_x, .from_y = y_peer[i], .to_x = local_x, .to_y = y_here[i]};
    };
    std::optional<Line> request;
    for (std::size_t i = 0; i < moments.size(); ++i)
        if (moments[i].way == Way::to_peer && moments[i].ms == 0)
            request = line_of(i);
    // Where what came from the peer crossed the request, by their shares of the way from here.
    std::vector<double> crossings(moments.size(), 0);
    double first_crossing = 0;
    for (std::size_t i = 0; i < moments.size() && request; ++i)
        if (moments[i].way == Way::to_local && (crossings[i] = crossing_of(*request, line_of(i))) > 0)
            first_crossing = first_crossing > 0 ? first_crossing : crossings[i];

    for (std::size_t i = 0; i < moments.size(); ++i) {
        const Moment& moment = moments[i];
        const std::string kind = kind_of(moment);
        svg.element(
            "text",
            {{"x", number(local_x - 10)}, {"y", number(y_here[i] + 4)}, {"text-anchor", "end"}, {"class", "time"}},
            margin_time(moment));
        if (moment.way == Way::none) {
            svg.leaf("circle", {{"cx", number(local_x)}, {"cy", number(y_here[i])}, {"r", "4"}, {"class", "point"}});
            draw_label(svg, local_x + 40, y_here[i], moment.what, kind);
            continue;
        }
        const Line line = line_of(i);
        draw_arrow(svg, line, kind);
        const bool is_request = moment.way == Way::to_peer && moment.ms == 0;
        const double crossed = is_request ? first_crossing : crossings[i] > 0 ? 1 - crossings[i] : 0;
        const double share = crossed > 0 && crossed < 0.5 ? 1 - label_share : label_share;
        draw_label(svg, line.from_x + share * (line.to_x - line.from_x),
                   line.from_y + share * (line.to_y - line.from_y), moment.what, kind);
    }
    for (const double share : crossings)
        if (share > 0)
            svg.leaf("circle", {{"cx", number(request->from_x + share * (request->to_x - request->from_x))},
                                {"cy", number(request->from_y + share * (request->to_y - request->from_y))},
                                {"r", "8"},
                                {"class", "crossing"}});
    svg.close();
    return diagram;
}

bool has_idle_times(const Pool& pool)
{
    return pool.upstream.rests.count() > 0 || pool.upstream.idle_timeout.samples() > 0 ||
           pool.upstream.own_idle_limit.timeout().has_value();
}

IdlePicture idle_picture(const Pool& pool, std::string_view name, std::string_view id)
{
    const Scale scale = scale_of(pool);
    const auto timeout = pool.upstream.idle_timeout.timeout();
    const OwnEnd own = own_end(pool);
    const double closed_at = timeout ? scale.percent(danger_from_ms(pool)) : 100;
    // Short: the smallest screens have room for 40 characters.
    const std::string own_text =
        own.ms == 0 ? std::string("this host: used none again so far")
                    : fmt::format("this host: {} after {}{}", own.closes ? "closes" : "reuses",
                                  own.closes ? "" : "up to ", duration_text(static_cast<std::uint64_t>(own.ms)));
    const std::string upstream_text = timeout ? fmt::format("upstream: closes after {}", duration_text(timeout->ms))
                                              : "upstream: " + unknown_close(pool);

    IdlePicture picture{.svg = {}, .sentence = idle_sentence(pool, name), .may_go_on = !own.closes, .some_die = false};
    Markup& svg = picture.svg;
    svg = titled(id, {"class", "idle"}, {"height", number(idle_height)},
                 fmt::format("Idle times of connections to {}", name),
                 fmt::format("{}; {}. {}", own_text, upstream_text, picture.sentence));
    const std::string hatch = fmt::format("{}-hatch", id);
    svg.open("defs").open("pattern", {{"id", hatch},
                                      {"width", "6"},
                                      {"height", "6"},
                                      {"patternUnits", "userSpaceOnUse"},
                                      {"patternTransform", "rotate(45)"}});
    svg.leaf("rect", {{"width", "6"}, {"height", "6"}, {"class", "hatch-ground"}});
    svg.leaf("rect", {{"width", "2.5"}, {"height", "6"}, {"class", "hatch"}}).close().close();

    if (timeout) {
        draw_bar(svg, closed_at, 100, upstream_y, base - upstream_y, "danger");
        draw_bar(svg, scale.percent(timeout->lowest_ms), scale.percent(timeout->highest_ms), upstream_y,
                 base - upstream_y, "spread");
        constexpr double wide = 25; // per cent, which hold the words on the smallest screen
        const bool inside = closed_at < 100 - wide;
        svg.element("text",
                    {{"x", at(inside ? closed_at + 1 : closed_at - 1)},
                     {"y", number(top - 9)},
                     {"text-anchor", inside ? "start" : "end"},
                     {"class", "dies"}},
                    inside ? "requests die" : "requests die ▸");
    }
    draw_axis(svg, scale, base, top);

    draw_own_lane(svg, own, own_text, scale, closed_at, hatch);
    draw_upstream_lane(svg, pool, upstream_text, scale);
    picture.some_die = draw_rests(svg, pool, scale, hatch) || (timeout && scale.percent(own.ms) > closed_at);
    svg.element("text", {{"x", "0"}, {"y", number(idle_height - 6)}, {"class", "lane"}},
                "idle time before a request, log scale");
    svg.close();
    return picture;
}

} // namespace finrace
