// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/upstream.h"

#include <algorithm>
#include <string_view>

#include "core/classify.h"

namespace finrace {

namespace {

UpstreamKey key_of(const std::uint8_t (&address)[16], std::uint16_t port, const event& e)
{
    UpstreamKey key;
    std::copy(std::begin(address), std::end(address), key.address.begin());
    key.port = port;
    key.family = e.family;
    if (key.is_loopback())
        key.netns = e.netns;
    return key;
}

} // namespace

bool UpstreamKey::is_loopback() const
{
    constexpr std::array<std::uint8_t, 16> loopback_6{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    return family == 6 ? address == loopback_6 : address.front() == 127;
}

UpstreamKey UpstreamKey::of(const event& e)
{
    return key_of(e.peer_address, e.peer_port, e);
}

UpstreamKey UpstreamKey::local_of(const event& e)
{
    return key_of(e.local_address, e.local_port, e);
}

UpstreamKey UpstreamKey::judged_at(const event& e)
{
    return is_client(e) ? of(e) : local_of(e);
}

std::size_t UpstreamKeyHash::operator()(const UpstreamKey& key) const noexcept
{
    const std::string_view bytes(reinterpret_cast<const char*>(key.address.data()), key.address.size());
    return std::hash<std::string_view>{}(bytes) ^ (std::size_t{key.port} << 16U) ^ key.family ^
           (std::size_t{key.netns} << 32U);
}

void OwnCloses::close(std::uint32_t rest_ms)
{
    rest(rest_ms);
    if (++newest_.count >= enough) {
        before_ = newest_;
        newest_ = {};
    }
}

std::uint64_t Upstream::watched_ns(std::uint64_t run_ns, std::uint64_t now_ns) const
{
    constexpr std::uint64_t least_ns = 3'600'000'000'000;

    if (first_ns == 0 || now_ns < first_ns)
        return run_ns;
    return std::min(run_ns, std::max(now_ns - first_ns, least_ns));
}

Upstream& Upstreams::at(const UpstreamKey& key, std::uint64_t now_ns)
{
    auto found = upstreams_.find(key);
    if (found == upstreams_.end()) {
        if (upstreams_.size() >= limit_)
            forget(now_ns);
        if (upstreams_.size() >= limit_) {
            other_used_ = true;
            return other_;
        }
        found = upstreams_.emplace(key, Upstream{}).first;
        found->second.first_ns = now_ns;
        if (timer_of_)
            found->second.idle_timeout.tell(timer_of_(key));
    }
    found->second.newest_ns = std::max(found->second.newest_ns, now_ns);
    return found->second;
}

void Upstreams::tell_timers(TimerOf timer_of)
{
    timer_of_ = std::move(timer_of);
    for (auto& [key, upstream] : upstreams_)
        upstream.idle_timeout.tell(timer_of_ ? timer_of_(key) : std::nullopt);
}

/// Under a flood of new upstreams each look costs: one a minute at most.
void Upstreams::forget(std::uint64_t now_ns)
{
    constexpr std::uint64_t look_every_ns = 60'000'000'000;

    if (now_ns < next_look_ns_)
        return;
    next_look_ns_ = now_ns + look_every_ns;
    std::erase_if(upstreams_, [now_ns](const auto& one) { return one.second.newest_ns + forgotten_after_ns < now_ns; });
}

void Upstreams::for_each(const std::function<void(const UpstreamKey*, const Upstream&)>& visit) const
{
    for (const auto& [key, upstream] : upstreams_)
        visit(&key, upstream);
    if (other_used_)
        visit(nullptr, other_);
}

} // namespace finrace
