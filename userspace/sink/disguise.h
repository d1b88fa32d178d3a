// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Addresses that leave the host in disguise: masked to their network, or hashed with a key that nobody else has. Either
// way they stay addresses, so that whatever reads them still can; a port stays as it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "sink/json.h"

namespace finrace {

class Disguise {
public:
    enum class Way : std::uint8_t { none, mask, hash };
    enum class Scope : std::uint8_t {
        clients, ///< those whom this host's processes serve
        all,     ///< upstreams and this host as well
    };
    static constexpr std::size_t shortest_key = 16; ///< bytes

    Disguise() = default;
    /// `key`: of at least shortest_key.
    Disguise(Way way, Scope scope, std::string key = {}) : way_(way), scope_(scope), key_(std::move(key)) {}

    /// Replaces what is to be disguised. Of an upstream's record whose address is masked, tells which upstream of that
    /// network it is (finrace.upstream.id).
    void apply(Json& record) const;
    /// Of an upstream: as it is, unless all are disguised.
    [[nodiscard]] std::string of_upstream(std::string_view address) const;

    /// mask: an IPv4 address's /24, an IPv6 address's /48 (RFC 6177: what a site gets). hash: 64 bits of HMAC-SHA-256
    /// (RFC 2104) in the discard-only prefix 100::/64 (RFC 6666): never anybody's address, and the same for the same
    /// address and key. What is no address stays, as does the loopback: everybody's.
    [[nodiscard]] std::string of(std::string_view address) const;

private:
    [[nodiscard]] std::uint64_t pseudonym(std::string_view bytes) const;

    Way way_ = Way::none;
    Scope scope_ = Scope::clients;
    std::string key_;
};

} // namespace finrace
