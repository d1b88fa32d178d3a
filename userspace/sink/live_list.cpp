// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/live_list.h"

#include <algorithm>
#include <cctype>

#include "core/cause.h"
#include "sink/facts.h"
#include "sink/text.h"

namespace finrace {

namespace {

bool contains(std::string_view text, std::string_view part)
{
    const auto same = [](char one, char other) {
        return std::tolower(static_cast<unsigned char>(one)) == std::tolower(static_cast<unsigned char>(other));
    };
    return std::search(text.begin(), text.end(), part.begin(), part.end(), same) != text.end();
}

} // namespace

bool matches(const Sighting& sighting, std::string_view text)
{
    const UpstreamKey where = UpstreamKey::judged_at(sighting.judged);
    return contains(to_string(sighting.verdict.cause), text) ||
           contains(endpoint_text(where.address.data(), where.port, where.family), text) ||
           contains(printable(sighting.process_name), text);
}

void LiveList::add(Sighting sighting, std::uint64_t now_ns)
{
    if (!paused_) {
        pass(std::move(sighting), now_ns);
        return;
    }
    if (kept_.size() == most_kept) {
        kept_.pop_front();
        ++forgotten_;
    }
    kept_.push_back({.sighting = std::move(sighting), .at_ns = now_ns});
}

void LiveList::pass(Sighting sighting, std::uint64_t at_ns)
{
    if (!filter_.empty() && !matches(sighting, filter_)) {
        ++hidden_;
        return;
    }
    if (at_ns >= second_began_ns_ + second_ns) {
        end_second();
        second_began_ns_ = at_ns;
    }
    const std::pair key{sighting.verdict.cause, UpstreamKey::judged_at(sighting.judged)};
    auto found = alike_.find(key);
    if (found == alike_.end() && alike_.size() < most_kinds)
        found = alike_.emplace(key, Alike{}).first;
    if (found == alike_.end()) {
        beyond_.cause = key.first;
        beyond_.where = key.second;
        beyond_.kinds = 2; // at least
        ++beyond_.count;
    } else if (found->second.shown < alike_shown && shown_ < most_shown_all) {
        ++found->second.shown;
        ++shown_;
        items_.emplace_back(std::move(sighting));
    } else {
        ++found->second.folded;
    }
}

void LiveList::end_second()
{
    std::vector<Folded> folded;
    for (const auto& [key, alike] : alike_)
        if (alike.folded > 0)
            folded.push_back(
                {.at_ns = second_began_ns_, .cause = key.first, .where = key.second, .count = alike.folded});
    std::stable_sort(folded.begin(), folded.end(),
                     [](const Folded& one, const Folded& other) { return one.count > other.count; });
    Folded rest = std::exchange(beyond_, {});
    rest.at_ns = second_began_ns_;
    rest.kinds = rest.count > 0 ? rest.kinds : 0;
    for (std::size_t i = 0; i < folded.size(); ++i) {
        if (i < most_folded) {
            items_.emplace_back(folded[i]);
            continue;
        }
        rest.cause = folded[i].cause;
        rest.where = folded[i].where;
        rest.count += folded[i].count;
        ++rest.kinds;
    }
    if (rest.count > 0)
        items_.emplace_back(rest);
    alike_.clear();
    shown_ = 0;
}

std::vector<LiveList::Item> LiveList::take(std::uint64_t now_ns)
{
    if (!paused_) {
        for (Kept& one : kept_)
            pass(std::move(one.sighting), one.at_ns);
        kept_.clear();
    }
    if (now_ns >= second_began_ns_ + second_ns)
        end_second();
    return std::exchange(items_, {});
}

std::vector<LiveList::Item> LiveList::take_all(std::uint64_t now_ns)
{
    std::vector<Item> items = take(now_ns);
    end_second();
    items.insert(items.end(), items_.begin(), items_.end());
    items_.clear();
    return items;
}

} // namespace finrace
