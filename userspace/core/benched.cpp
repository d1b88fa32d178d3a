// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/benched.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/classify.h"
#include "core/upstream.h"

namespace finrace {

namespace {

/// nginx's word for it. A 503 may be another refusal of the proxy's own (a limit of requests).
constexpr std::uint16_t bad_gateway = 502;

} // namespace

Verdict judge_benched(const Benched& benched)
{
    const event& answer = benched.answer;
    const std::uint64_t after_ms = (answer.timestamp_ns - benched.loss.timestamp_ns) / 1'000'000;
    return {.cause = Cause::upstream_benched,
            .variant = Variant::none,
            .certainty = answer.http_status == bad_gateway ? Certainty::likely : Certainty::possible,
            .message =
                fmt::format("{} client{} got {} without any upstream's being tried: the proxy had set this one aside "
                            "after its {}, {} ms before.",
                            answer.untried == 1 ? "A" : std::to_string(answer.untried), answer.untried == 1 ? "" : "s",
                            answer.http_status, to_string(benched.cause), after_ms)};
}

void Benches::note_loss(const event& e, Cause cause)
{
    const std::uint32_t process = e.connection.pid;
    if (process == 0 || cause == Cause::client_abort || cause == Cause::upstream_benched)
        return;
    if (losses_.size() >= capacity && losses_.count(process) == 0)
        losses_.erase(std::min_element(losses_.begin(), losses_.end(), [](const auto& a, const auto& b) {
            return a.second.back().e.timestamp_ns < b.second.back().e.timestamp_ns;
        }));
    std::vector<Loss>& losses = losses_[process];
    std::erase_if(losses, [&](const Loss& one) { return UpstreamKey::of(one.e) == UpstreamKey::of(e); });
    if (losses.size() == most_upstreams)
        losses.erase(losses.begin());
    losses.push_back({.e = e, .cause = cause});
}

void Benches::note_answer(const event& e)
{
    if (answers_.size() >= capacity)
        judge_oldest();
    answers_.push_back(e);
}

void Benches::judge_oldest()
{
    const event answer = answers_.front();
    answers_.pop_front();
    const auto found = losses_.find(answer.connection.pid);
    if (found == losses_.end())
        return;
    const std::vector<Loss>& losses = found->second;
    const auto may_be_it = [&](const Loss& one) {
        return one.e.timestamp_ns <= answer.timestamp_ns &&
               answer.timestamp_ns - one.e.timestamp_ns <= FINRACE_ASIDE_MOST_NS;
    };
    const auto loss = std::find_if(losses.rbegin(), losses.rend(), may_be_it);
    if (loss == losses.rend())
        return;
    deliver_({.loss = loss->e, .cause = loss->cause, .answer = answer});
}

void Benches::advance(std::uint64_t now_ns)
{
    while (!answers_.empty() && now_ns >= answers_.front().timestamp_ns + wait_ns)
        judge_oldest();
}

void Benches::finish()
{
    while (!answers_.empty())
        judge_oldest();
}

} // namespace finrace
