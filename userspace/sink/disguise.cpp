// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/disguise.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>

#include <fmt/format.h>
#include <nettle/hmac.h>
#include <nlohmann/json.hpp>

#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::size_t v4_bytes = 4;
constexpr std::size_t v6_bytes = 16;
constexpr std::size_t v4_shown = 3;
constexpr std::size_t v6_shown = 6;
constexpr std::size_t v6to4_shown = 2 + v4_shown;

bool is_loopback(const Address& address)
{
    constexpr std::array<std::uint8_t, v6_bytes> loopback_6{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    return address.family == 6 ? address.bytes == loopback_6 : address.bytes.front() == 127;
}

/// Of units that systemd has started for one connection (Accept=yes) the instance is both ends' addresses, as in
/// "log@7-10.0.0.1:514-192.0.2.77:40112.service": instance_from_socket(), systemd v252.
std::string without_peers(std::string path)
{
    for (std::size_t at = path.find('@'); at != std::string::npos; at = path.find('@', at + 1)) {
        const std::size_t end = std::min(path.find('/', at), path.size());
        const std::size_t suffix = path.rfind('.', end);
        if (suffix != std::string::npos && suffix > at && path.find(':', at) < suffix)
            path.erase(at + 1, suffix - at - 1);
    }
    return path;
}

} // namespace

/// 64 bits of HMAC-SHA-256, the first byte in the highest place.
std::uint64_t Disguise::pseudonym(std::string_view bytes) const
{
    hmac_sha256_ctx hash{};
    std::array<std::uint8_t, sizeof(std::uint64_t)> digest{};
    hmac_sha256_set_key(&hash, key_.size(), reinterpret_cast<const std::uint8_t*>(key_.data()));
    hmac_sha256_update(&hash, bytes.size(), reinterpret_cast<const std::uint8_t*>(bytes.data()));
    hmac_sha256_digest(&hash, digest.size(), digest.data());
    return std::accumulate(digest.begin(), digest.end(), std::uint64_t{0},
                           [](std::uint64_t all, std::uint8_t byte) { return all << 8U | byte; });
}

std::string Disguise::of(std::string_view address) const
{
    if (way_ == Way::none)
        return std::string(address);
    std::optional<Address> parsed = parse_address(std::string(address));
    if (!parsed || is_loopback(*parsed))
        return std::string(address);
    std::array<std::uint8_t, v6_bytes>& bytes = parsed->bytes;
    const bool is_6 = parsed->family == 6;
    const std::size_t size = is_6 ? v6_bytes : v4_bytes;
    if (way_ == Way::mask) {
        const bool is_6to4 = is_6 && bytes[0] == 0x20 && bytes[1] == 0x02; // RFC 3056: an IPv4 address follows
        std::fill(bytes.begin() + (is_6to4 ? v6to4_shown : is_6 ? v6_shown : v4_shown), bytes.end(), std::uint8_t{0});
        return address_text(bytes.data(), parsed->family);
    }
    const std::uint64_t hash = pseudonym({reinterpret_cast<const char*>(bytes.data()), size});
    bytes = {0x01, 0x00};
    for (std::size_t i = 0; i < sizeof(hash); ++i)
        bytes[v6_bytes - 1 - i] = static_cast<std::uint8_t>(hash >> 8U * i);
    return address_text(bytes.data(), 6);
}

std::string Disguise::of_upstream(std::string_view address) const
{
    return scope_ == Scope::all ? of(address) : std::string(address);
}

void Disguise::apply(Json& record) const
{
    if (way_ == Way::none)
        return;
    const auto replace = [&](const char* path) {
        const Json::json_pointer where(path);
        if (record.contains(where))
            record[where] = of(record[where].get<std::string>());
    };
    const auto says = [&](const char* path, const char* word) {
        const Json::json_pointer where(path);
        return record.contains(where) && record[where] == word;
    };
    if (way_ == Way::mask && scope_ == Scope::all && says("/event/name", "finrace.upstream")) {
        const Json::json_pointer peer("/network/peer/address");
        if (record.contains(peer) && record[peer] != of(record[peer].get<std::string>()))
            record["finrace"]["upstream"]["id"] = fmt::format("{:016x}", pseudonym(record[peer].get<std::string>()));
    }
    for (const char* path : {"/process/linux/cgroup", "/finrace/systemd_unit"})
        if (const Json::json_pointer where(path); record.contains(where))
            record[where] = without_peers(record[where].get<std::string>());
    replace("/finrace/outcome/client_address");
    if (scope_ == Scope::all || says("/finrace/side", "server"))
        replace("/network/peer/address");
    if (scope_ == Scope::all) {
        replace("/network/local/address");
        replace("/finrace/outcome/retry/peer_address");
    }
}

} // namespace finrace
