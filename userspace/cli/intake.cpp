// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/intake.h"

#include <numeric>
#include <utility>

#include "core/flags.h"
#include "sink/facts.h"

namespace finrace {

Intake::Intake(Filter filter, const ProcessNames& names, bool tells_outcomes)
    : filter_(std::move(filter)), names_(names)
{
    begin_anew(tells_outcomes);
}

void Intake::begin_anew(bool tells_outcomes)
{
    events_ = outcome_events_ = ended_ = adopted_ended_ = unclassified_ = 0;
    verdicts_.clear();
    docket_.emplace(tells_outcomes, [this](const Judged& judged) { on_judged(judged); });
    know(std::move(timers_));
}

void Intake::know(IdleTimers timers)
{
    timers_ = std::move(timers);
    docket_->tell_timers([this](const UpstreamKey& key) { return timers_.of(key); });
}

std::uint64_t Intake::connections_ended(const loss_counters& losses) const
{
    return ended_ + losses.by_kind[EVENT_CLOSED] + losses.by_kind[EVENT_OPEN_FAILED] + losses.by_place[LOSS_TABLE_FULL];
}

bool Intake::admits(const event& e)
{
    ++events_;
    if (e.connection.id != 0 && (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED)) {
        ++ended_;
        adopted_ended_ += has(e, CONNECTION_ADOPTED) ? 1 : 0;
    }
    // What tells of outcomes is about others as well: a client's connection, another upstream's. And the server at the
    // other end is another process.
    const bool tells_outcome = e.kind >= EVENT_RELEASED;
    outcome_events_ += tells_outcome ? 1 : 0;
    if (tells_outcome || !is_client(e) || filter_.matches(e, names_))
        return true;
    listener_->on_passed_over(e);
    return false;
}

void Intake::take(const event& e)
{
    if (e.kind < EVENT_RELEASED && e.connection.id != 0 && filter_.matches(e, names_))
        listener_->on_event(e);
    docket_->take(e);
}

std::uint64_t Intake::verdicts_in_all() const
{
    return std::accumulate(verdicts_.begin(), verdicts_.end(), std::uint64_t{0},
                           [](std::uint64_t sum, const auto& one) { return sum + one.second; });
}

void Intake::on_judged(const Judged& judged)
{
    if (judged.classification.ending == Ending::unclassified)
        ++unclassified_;
    if (!judged.classification.verdict || !filter_.matches(judged.e, names_))
        return;
    ++verdicts_[judged.classification.verdict->cause];
    listener_->on_verdict(judged);
}

} // namespace finrace
