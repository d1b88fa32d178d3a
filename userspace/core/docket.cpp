// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/docket.h"

#include <iterator>
#include <utility>

#include "core/flags.h"

namespace finrace {

namespace {

/// Who waits is looked at so often at most: under a flood of failures, each look costs.
constexpr std::uint64_t look_every_ns = 10'000'000;

} // namespace

void Docket::deliver(const event& e, const event& last, Classification classification, const Outcome& outcome)
{
    if (classification.ending == Ending::none)
        return;
    const event* server_end = classification.verdict ? server_ends_.of(e) : nullptr;
    Upstream& upstream = upstreams_.at(UpstreamKey::of(e), e.timestamp_ns);
    if (classification.verdict)
        if (const event* overflow = server_ends_.overflow_of(e))
            corroborate_with_overflow(*classification.verdict, *overflow);
    if (server_end != nullptr) {
        const Cause before = classification.verdict->cause;
        corroborate(*classification.verdict, e, *server_end, upstream.idle_timeout.timeout());
        --upstream.counts.verdicts[before];
        ++upstream.counts.verdicts[classification.verdict->cause];
    }
    if (classification.verdict && is_race(classification.verdict->cause))
        classification.verdict->reason = upstream.closes.reason(e, upstream.idle_timeout.timeout());
    if (classification.verdict && e.kind == EVENT_LOCAL_FIN) {
        if (named_.size() >= capacity) // their EVENT_CLOSED was lost
            named_.clear();
        named_.insert(e.connection.id);
    }
    if (classification.verdict)
        benches_.note_loss(e, classification.verdict->cause);
    deliver_({.e = e,
              .last = last,
              .classification = classification,
              .outcome = outcome,
              .upstream = upstream,
              .server_end = server_end});
}

void Docket::deliver_benched(const Benched& benched)
{
    const Classification classification{
        .ending = Ending::verdict, .verdict = judge_benched(benched), .learned_idle_ms = std::nullopt};
    Upstream& upstream = upstreams_.at(UpstreamKey::of(benched.loss), benched.answer.timestamp_ns);
    ++upstream.counts.verdicts[classification.verdict->cause];
    Outcome outcome;
    outcome.client = client_of(benched.answer, classification.verdict->certainty);
    event e = benched.loss;
    e.timestamp_ns = benched.answer.timestamp_ns;
    deliver_({.e = e,
              .last = e,
              .classification = classification,
              .outcome = outcome,
              .upstream = upstream,
              .server_end = nullptr,
              .benched = &benched});
}

void Docket::deliver_of_server(const event& e, std::optional<Verdict> verdict)
{
    static const Upstream no_upstream;
    static const Outcome no_outcome;
    if (!verdict)
        return;
    const Classification classification{
        .ending = Ending::verdict, .verdict = std::move(verdict), .learned_idle_ms = std::nullopt};
    deliver_({.e = e,
              .last = e,
              .classification = classification,
              .outcome = no_outcome,
              .upstream = no_upstream,
              .server_end = nullptr});
}

void Docket::wait(const event& e, std::optional<Classification> classification)
{
    if (waiting_.size() >= capacity)
        settle(waiting_.begin());
    waiting_.push_back({.e = e, .last = e, .classification = std::move(classification), .closed = std::nullopt});
    by_connection_.insert_or_assign(e.connection.id, std::prev(waiting_.end()));
}

void Docket::take(const event& e)
{
    if (e.kind == EVENT_ACCEPT_OVERFLOW) {
        server_ends_.note_overflow(e);
        return;
    }
    if (e.kind >= EVENT_RELEASED) {
        if (has(e, CONNECTION_UNTRIED))
            benches_.note_answer(e);
        else
            outcomes_.note(e);
        return;
    }
    if (!has(e, CONNECTION_CLIENT)) {
        if (is_server_end(e))
            server_ends_.note(e);
        return;
    }
    server_ends_.meet(e);
    if (const auto found = by_connection_.find(e.connection.id); found != by_connection_.end()) {
        Waiting& waiting = *found->second;
        waiting.last = e;
        if (e.kind == EVENT_CLOSED && waiting.e.kind == EVENT_LOCAL_FIN) {
            waiting.closed = e;
            return;
        }
    }
    if (e.kind == EVENT_CLOSED && named_.erase(e.connection.id) != 0) {
        Outcome outcome;
        outcome.named = true;
        account(e, upstreams_, outcome);
        return;
    }
    if (tells_outcomes_ && depends_on_outcome(e)) {
        wait(e, std::nullopt);
        return;
    }
    Classification classification = account(e, upstreams_);
    if (tells_outcomes_ && classification.verdict)
        wait(e, std::move(classification));
    else
        deliver(e, e, std::move(classification), {});
}

void Docket::settle(std::list<Waiting>::iterator place)
{
    const Waiting waiting = std::move(*place);
    // It may wait twice, and the later have gone first.
    if (const auto found = by_connection_.find(waiting.e.connection.id);
        found != by_connection_.end() && found->second == place)
        by_connection_.erase(found);
    waiting_.erase(place);

    Outcome outcome = outcomes_.of(waiting.e);
    Classification classification =
        waiting.classification ? *waiting.classification : account(waiting.e, upstreams_, outcome);
    deliver(waiting.e, waiting.last, std::move(classification), outcome);
    if (!waiting.closed)
        return;
    outcome.named = named_.erase(waiting.e.connection.id) != 0;
    deliver(*waiting.closed, *waiting.closed, account(*waiting.closed, upstreams_, outcome), outcome);
}

void Docket::advance(std::uint64_t now_ns)
{
    server_ends_.advance(now_ns);
    benches_.advance(now_ns);
    if (waiting_.empty())
        return;
    const bool look = now_ns >= looked_ns_ + look_every_ns;
    if (look)
        looked_ns_ = now_ns;
    for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
        const auto place = waiting++;
        if (now_ns >= place->e.timestamp_ns + wait_ns || (look && outcomes_.is_settled(place->e, now_ns)))
            settle(place);
        else if (!look)
            return; // the others are younger
    }
}

void Docket::finish()
{
    while (!waiting_.empty())
        settle(waiting_.begin());
    server_ends_.finish();
    benches_.finish();
}

} // namespace finrace
