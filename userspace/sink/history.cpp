// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/history.h"

namespace finrace {

void StateHistories::History::push(std::uint8_t state, std::uint64_t at)
{
    if (count == capacity)
        return;
    states[count] = state;
    at_ns[count] = at;
    ++count;
}

void StateHistories::add(const event& e)
{
    if (e.old_state == e.new_state)
        return;
    const auto [found, is_new] = histories_.try_emplace(e.connection.id);
    History& history = found->second;
    if (is_new) {
        // CLOSE before SYN_SENT is where every socket comes from. Any other state was entered unseen.
        if (e.old_state != TCP_STATE_CLOSE)
            history.push(e.old_state, e.old_state == TCP_STATE_ESTABLISHED ? e.connection.opened_ns : 0);
    } else if (history.count > 0) {
        const std::uint8_t last = history.states[history.count - 1U];
        if (last == e.new_state)
            return; // told of twice
        if (last != e.old_state)
            history.push(e.old_state, 0); // the event that told of it was lost
    }
    history.push(e.new_state, e.timestamp_ns);
    if (histories_.size() > limit_)
        histories_.erase(histories_.begin());
}

std::vector<StateStep> StateHistories::take(std::uint64_t connection_id)
{
    std::vector<StateStep> steps;
    const auto found = histories_.find(connection_id);
    if (found == histories_.end())
        return steps;
    const History& history = found->second;
    for (std::size_t i = 0; i < history.count; ++i)
        steps.push_back({.state = history.states[i], .at_ns = history.at_ns[i]});
    histories_.erase(found);
    return steps;
}

} // namespace finrace
