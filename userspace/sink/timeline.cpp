// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/timeline.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "core/cause.h"
#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::size_t shows_at = 36; ///< column
constexpr std::size_t narrowest_shows = 24;
constexpr std::size_t shows_below_at = 8;

std::string_view arrow(Moment::Way way)
{
    switch (way) {
    case Moment::Way::to_peer:
        return "──▶";
    case Moment::Way::to_local:
        return "◀──";
    case Moment::Way::none:
        break;
    }
    return " · ";
}

std::string head(const Sighting& sighting, const WallClock& clock, const Paint& paint)
{
    const Verdict& verdict = sighting.verdict;
    const std::string certainty(to_string(verdict.certainty));
    std::string line =
        paint.dim(clock.time_of_day(sighting.judged.timestamp_ns)) + "  " + paint.red(to_string(verdict.cause));
    if (verdict.variant != Variant::none)
        line += fmt::format(" ({})", to_string(verdict.variant));
    line += "  " + (verdict.certainty == Certainty::proven ? paint.green(certainty) : paint.yellow(certainty));
    if (verdict.reason && *verdict.reason != Reason::unknown)
        line += paint.dim(fmt::format("  {}", to_string(*verdict.reason)));
    if (verdict.incomplete)
        line += paint.yellow(", incomplete");
    return line;
}

} // namespace

std::string timeline(const Sighting& sighting, const WallClock& clock, const Paint& paint, std::size_t width)
{
    std::string text = head(sighting, clock, paint) + "\n";
    for (const std::string& line : wrap(whereabouts(sighting), width - 2))
        text += "  " + line + "\n";
    // Where that leaves too little room, what a segment shows goes below it.
    const bool below = width < shows_at + narrowest_shows;
    const std::size_t indent = below ? shows_below_at : shows_at;
    for (const Moment& moment : moments_of(sighting)) {
        const std::string time =
            moment.rest ? fmt::format("{:>+10.0f}    ", moment.ms) : fmt::format("{:>+14.3f}", moment.ms);
        text += fmt::format("  {} ms  {}  ", paint.dim(time), paint.cyan(arrow(moment.way)));
        text += moment.shows.empty() || below ? moment.what : fmt::format("{:<8}  ", moment.what);
        bool first = !below;
        for (const std::string& line : wrap(moment.shows, width > indent ? width - indent : 1))
            text += std::exchange(first, false) ? line : fmt::format("\n{:{}}{}", "", indent, line);
        text += '\n';
    }
    for (const std::string& line : wrap(printable(sighting.verdict.message), width - 2))
        text += "  " + paint.bold(line) + "\n";
    for (const std::string& line : wrap(outcome_text(sighting.outcome), width - 2))
        text += "  " + line + "\n";
    return text + "\n";
}

void SightingQueue::add(Sighting sighting)
{
    if (waiting_.size() == capacity) {
        ready_.push_back(std::move(waiting_.front()));
        waiting_.pop_front();
    }
    waiting_.push_back(std::move(sighting));
}

void SightingQueue::follow(const event& e)
{
    for (Sighting& sighting : waiting_)
        if (sighting.judged.connection.id == e.connection.id)
            sighting.last = e;
}

std::vector<Sighting> SightingQueue::take_ready(std::uint64_t now_ns)
{
    const auto first_waiting = std::stable_partition(waiting_.begin(), waiting_.end(), [&](const Sighting& sighting) {
        return sighting.last.kind == EVENT_CLOSED || sighting.last.kind == EVENT_OPEN_FAILED ||
               now_ns >= sighting.judged.timestamp_ns + hold_ns;
    });
    std::move(waiting_.begin(), first_waiting, std::back_inserter(ready_));
    waiting_.erase(waiting_.begin(), first_waiting);
    return std::exchange(ready_, {});
}

std::vector<Sighting> SightingQueue::take_all()
{
    std::move(waiting_.begin(), waiting_.end(), std::back_inserter(ready_));
    waiting_.clear();
    return std::exchange(ready_, {});
}

} // namespace finrace
