// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/disguise.h"

#include <algorithm>
#include <array>
#include <optional>

#include <nettle/hmac.h>
#include <nlohmann/json.hpp>

#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::size_t v4_bytes = 4;
constexpr std::size_t v6_bytes = 16;
constexpr std::size_t v4_shown = 3;
constexpr std::size_t v6_shown = 6;

} // namespace

std::string Disguise::of(std::string_view address) const
{
    if (way_ == Way::none)
        return std::string(address);
    std::optional<Address> parsed = parse_address(std::string(address));
    if (!parsed)
        return std::string(address);
    std::array<std::uint8_t, v6_bytes>& bytes = parsed->bytes;
    const bool is_6 = parsed->family == 6;
    const std::size_t size = is_6 ? v6_bytes : v4_bytes;
    if (way_ == Way::mask) {
        std::fill(bytes.begin() + (is_6 ? v6_shown : v4_shown), bytes.end(), std::uint8_t{0});
        return address_text(bytes.data(), parsed->family);
    }
    hmac_sha256_ctx hash{};
    hmac_sha256_set_key(&hash, key_.size(), reinterpret_cast<const std::uint8_t*>(key_.data()));
    hmac_sha256_update(&hash, size, bytes.data());
    bytes = {0x01, 0x00};
    hmac_sha256_digest(&hash, v6_bytes / 2, bytes.data() + v6_bytes / 2);
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
    replace("/finrace/outcome/client_address");
    if (scope_ == Scope::all || says("/finrace/side", "server"))
        replace("/network/peer/address");
    if (scope_ == Scope::all) {
        replace("/network/local/address");
        replace("/finrace/outcome/retry/peer_address");
    }
}

} // namespace finrace
