// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/upstream.h"

#include <algorithm>
#include <string_view>

namespace finrace {

UpstreamKey UpstreamKey::of(const event& e)
{
    UpstreamKey key;
    std::copy(std::begin(e.peer_address), std::end(e.peer_address), key.address.begin());
    key.port = e.peer_port;
    key.family = e.family;
    return key;
}

std::size_t UpstreamKeyHash::operator()(const UpstreamKey& key) const noexcept
{
    const std::string_view bytes(reinterpret_cast<const char*>(key.address.data()), key.address.size());
    return std::hash<std::string_view>{}(bytes) ^ (std::size_t{key.port} << 16U) ^ key.family;
}

void IdleTimeoutLearner::learn(std::uint32_t idle_ms)
{
    if (samples_.size() < capacity) {
        samples_.push_back(idle_ms);
    } else {
        samples_[next_] = idle_ms;
        next_ = (next_ + 1) % capacity;
    }
    known_.reset();
}

std::optional<IdleTimeout> IdleTimeoutLearner::timeout() const
{
    if (known_)
        return *known_;
    std::optional<IdleTimeout> result;
    std::vector<std::uint32_t> sorted = samples_;
    std::sort(sorted.begin(), sorted.end());
    // A timer checked once a second (gunicorn's gthread) makes a wide cluster, most others a narrow one: the
    // narrowest width that holds most of the samples is the timer's.
    for (const std::uint32_t percent : {2U, 10U, 50U}) {
        std::size_t best_first = 0;
        std::size_t best_count = 0;
        for (std::size_t first = 0, last = 0; first < sorted.size(); ++first) {
            const std::uint32_t width = std::max(30U, sorted[first] / 100 * percent);
            while (last < sorted.size() && sorted[last] - sorted[first] <= width)
                ++last;
            if (last - first > best_count) {
                best_count = last - first;
                best_first = first;
            }
        }
        if (best_count >= 3 && best_count * 10 >= sorted.size() * 6) {
            result = IdleTimeout{
                .ms = sorted[best_first + best_count / 2],
                .spread_ms = sorted[best_first + best_count - 1] - sorted[best_first],
                .samples = static_cast<std::uint32_t>(best_count),
            };
            break;
        }
    }
    known_ = result;
    return result;
}

Upstream& Upstreams::at(const UpstreamKey& key)
{
    if (const auto found = upstreams_.find(key); found != upstreams_.end())
        return found->second;
    if (upstreams_.size() >= limit_) {
        other_used_ = true;
        return other_;
    }
    return upstreams_[key];
}

void Upstreams::for_each(const std::function<void(const UpstreamKey*, const Upstream&)>& visit) const
{
    for (const auto& [key, upstream] : upstreams_)
        visit(&key, upstream);
    if (other_used_)
        visit(nullptr, other_);
}

} // namespace finrace
