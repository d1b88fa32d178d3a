// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/live_view.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/units.h"
#include "sink/facts.h"
#include "sink/sentences.h"

namespace finrace {

namespace {

constexpr std::size_t fewest_with_head = 4; ///< lines: with less the columns' names would take an upstream's place

std::string elapsed_text(std::uint64_t ns)
{
    const std::uint64_t seconds = ns / ns_per_second;
    return seconds < 3600 ? fmt::format("{:02}:{:02}", seconds / 60, seconds % 60)
                          : fmt::format("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
}

/// What must not be missed comes first: a narrow terminal cuts the line's end.
std::string whole_line(const LiveStatus& status, const Paint& paint, std::size_t width)
{
    std::vector<std::string> parts{paint.dim(elapsed_text(status.watched_ns))};
    if (status.paused)
        parts.push_back(paint.yellow("PAUSED") + fmt::format(" {} new", status.kept));
    if (status.forgotten > 0)
        parts.push_back(paint.red(fmt::format("{} dropped", status.forgotten)));
    if (status.lost > 0)
        parts.push_back(paint.red(fmt::format("{} lost", status.lost)));
    if (status.not_taken > 0)
        parts.push_back(paint.red(fmt::format("{} lines not shown", status.not_taken)));
    if (!status.filter.empty() || status.hidden > 0)
        parts.push_back(paint.yellow(fmt::format("filter {}", printable(status.filter))) +
                        fmt::format(" ({} hidden)", status.hidden));
    std::vector<std::pair<std::uint64_t, Cause>> causes;
    for (const auto& [cause, count] : status.verdicts)
        causes.emplace_back(count, cause);
    std::stable_sort(causes.begin(), causes.end(),
                     [](const auto& one, const auto& other) { return one.first > other.first; });
    std::vector<std::string> counts;
    counts.reserve(causes.size() + 1);
    for (const auto& [count, cause] : causes)
        counts.push_back(fmt::format("{} {}", count, to_string(cause)));
    if (status.unclassified > 0)
        counts.push_back(fmt::format("{} unclassified", status.unclassified));
    parts.push_back(counts.empty() ? "no verdict" : fmt::format("{}", fmt::join(counts, ", ")));
    std::string line = fmt::format("{}", fmt::join(parts, "  "));
    const std::string keys = "p pause  f filter  q end  ? keys";
    const std::string fewer = "? keys";
    for (const std::string& one : {keys, fewer})
        if (columns(line) + 2 + one.size() <= width)
            return line + std::string(width - columns(line) - one.size(), ' ') + paint.dim(one);
    return cut(line, width);
}

std::string rate_text(const std::optional<double>& rate)
{
    if (!rate)
        return "-";
    return *rate < 9.95 ? fmt::format("{:.1f}", *rate) : fmt::format("{:.0f}", *rate);
}

std::string timeout_text(const std::optional<IdleTimeout>& timeout, bool with_spread)
{
    if (!timeout)
        return "-";
    const std::string text = duration_text(timeout->ms);
    return with_spread ? fmt::format("{} ±{}", text, duration_text((timeout->spread_ms() + 1) / 2)) : text;
}

std::string exposure_text(PoolState state)
{
    std::string text(to_string(state));
    std::replace(text.begin(), text.end(), '_', ' ');
    return text;
}

/// The table's columns for a terminal's width: what does not fit is left out, the least telling first.
class Table {
public:
    Table(const std::vector<UpstreamStatus>& upstreams, std::size_t width)
    {
        std::size_t name = narrowest_name;
        for (const UpstreamStatus& one : upstreams)
            name = std::max(name, columns(one.name));
        const std::size_t worst = exposure_width + races_width + 2 * gap; // these two stand beside any name
        name = std::min({name, widest_name, width > narrowest_name + worst ? width - worst : width});
        std::size_t left = width > name ? width - name : 0;
        const auto fits = [&](std::size_t columns_of_it) {
            const bool room = left >= columns_of_it + gap;
            left -= room ? columns_of_it + gap : 0;
            return room;
        };
        exposure_ = fits(exposure_width);
        races_ = exposure_ && fits(races_width);
        rate_ = races_ && fits(rate_width);
        connections_ = rate_ && fits(2 * connections_width + gap);
        timeout_ = connections_ && fits(short_timeout);
        spread_ = timeout_ && left >= long_timeout - short_timeout;
        name_ = std::min(name, width);
    }

    [[nodiscard]] std::string head(const Paint& paint) const
    {
        return paint.dim(row("upstream", "idle", "busy", "req/s", "timeout", "exposure", "races"));
    }

    [[nodiscard]] std::string line(const UpstreamStatus& one, const Paint& paint) const
    {
        std::string exposure = fmt::format("{:<{}}", exposure_text(one.exposure), exposure_width);
        if (one.exposure == PoolState::exposed)
            exposure = paint.red(exposure);
        else if (one.exposure == PoolState::safe)
            exposure = paint.green(exposure);
        std::string races = fmt::format("{:>{}}", one.races, races_width);
        if (one.races > 0)
            races = paint.red(races);
        return row(one.name, one.sampled ? std::to_string(one.idle) : "-", one.sampled ? std::to_string(one.busy) : "-",
                   rate_text(one.requests_per_second), timeout_text(one.timeout, spread_), exposure, races);
    }

private:
    static constexpr std::size_t narrowest_name = 8;
    static constexpr std::size_t widest_name = 47; ///< "[2001:db8:...]:65535"
    static constexpr std::size_t gap = 2;
    static constexpr std::size_t exposure_width = 10;
    static constexpr std::size_t races_width = 5;
    static constexpr std::size_t rate_width = 6;
    static constexpr std::size_t connections_width = 5;
    static constexpr std::size_t short_timeout = 8;
    static constexpr std::size_t long_timeout = 15;

    /// Padded by columns: fmt counts "±" as it is shown, but colours as well.
    static std::string padded(const std::string& text, std::size_t width, bool to_the_right)
    {
        const std::string space(width - std::min(width, columns(text)), ' ');
        return to_the_right ? space + text : text + space;
    }

    [[nodiscard]] std::string row(const std::string& name, const std::string& idle, const std::string& busy,
                                  const std::string& rate, const std::string& timeout, const std::string& exposure,
                                  const std::string& races) const
    {
        const std::string between(gap, ' ');
        std::string text = padded(cut(name, name_), name_, false);
        if (connections_)
            text += between + padded(idle, connections_width, true) + between + padded(busy, connections_width, true);
        if (rate_)
            text += between + padded(rate, rate_width, true);
        if (timeout_)
            text += between + padded(timeout, spread_ ? long_timeout : short_timeout, false);
        if (exposure_)
            text += between + padded(exposure, exposure_width, false);
        if (races_)
            text += between + padded(races, races_width, true);
        return text;
    }

    std::size_t name_;
    bool exposure_;
    bool races_;
    bool rate_;
    bool connections_;
    bool timeout_;
    bool spread_;
};

/// The worst first, of these the busiest.
void sort_by_need(std::vector<UpstreamStatus>& upstreams)
{
    const auto need = [](const UpstreamStatus& one) {
        return std::tuple(one.exposure == PoolState::exposed || one.races > 0, one.races,
                          one.requests_per_second.value_or(0), one.idle + one.busy);
    };
    std::sort(upstreams.begin(), upstreams.end(), [&](const UpstreamStatus& one, const UpstreamStatus& other) {
        return need(one) != need(other) ? need(one) > need(other) : one.name < other.name;
    });
}

} // namespace

std::size_t most_status_lines(std::size_t height)
{
    return std::max<std::size_t>(height / 3, 1);
}

std::vector<std::string> status_lines(LiveStatus status, const Paint& paint, std::size_t width, std::size_t height)
{
    std::size_t room = most_status_lines(height);
    std::vector<std::string> lines;
    const std::string prompt =
        status.typing ? cut(fmt::format("filter: {}_", printable(*status.typing)), width) : std::string();
    if (status.typing && room == 1)
        return {prompt};
    room -= status.typing ? 1 : 0;
    lines.push_back(whole_line(status, paint, width));
    sort_by_need(status.upstreams);
    const Table table(status.upstreams, width);
    if (room >= fewest_with_head && !status.upstreams.empty())
        lines.push_back(cut(table.head(paint), width));
    std::size_t shown = std::min(status.upstreams.size(), room - lines.size());
    if (shown < status.upstreams.size() && shown > 0)
        --shown; // a line for those that are not shown
    for (std::size_t i = 0; i < shown; ++i)
        lines.push_back(cut(table.line(status.upstreams[i], paint), width));
    if (shown < status.upstreams.size() && lines.size() < room)
        lines.push_back(cut(paint.dim(shown > 0 ? fmt::format("and {} more", status.upstreams.size() - shown)
                                                : counted(status.upstreams.size(), "upstream")),
                            width));
    if (status.typing)
        lines.push_back(prompt);
    return lines;
}

std::string folded_text(const Folded& folded, const WallClock& clock, const Paint& paint)
{
    const std::string when = paint.dim(clock.time_of_day(folded.at_ns));
    if (folded.kinds > 1)
        return fmt::format("{}  {} more verdicts on other causes and upstreams in this second, folded\n\n", when,
                           folded.count);
    return fmt::format("{}  {}  {} more like it from {} in this second, folded\n\n", when,
                       paint.red(to_string(folded.cause)), folded.count,
                       endpoint_text(folded.where.address.data(), folded.where.port, folded.where.family));
}

std::string keys_text(const Paint& paint)
{
    std::string text;
    for (const auto& [keys, what] : {std::pair{"p, space", "pause, and go on: what comes meanwhile is kept"},
                                     {"f, /", "filter by cause, upstream's address:port or process;"},
                                     {"", "Enter applies it, Escape leaves it, an empty one shows all"},
                                     {"Ctrl-L", "draw the lower lines anew"},
                                     {"?, h", "this"},
                                     {"q, Ctrl-C", "end"}})
        text += fmt::format("  {}  {}\n", paint.bold(fmt::format("{:<9}", keys)), what);
    return text + "\n";
}

} // namespace finrace
