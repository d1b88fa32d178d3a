// SPDX-License-Identifier: GPL-2.0-only OR MIT
// IPv4-mapped IPv6 addresses (RFC 4291 2.5.5.2): an IPv6 socket's way to speak IPv4. Everywhere here they are IPv4.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace finrace {

constexpr std::array<std::uint8_t, 12> ipv4_mapped_prefix{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

/// `address`: 16 bytes in network order.
inline bool is_ipv4_mapped(const std::uint8_t* address)
{
    return std::equal(ipv4_mapped_prefix.begin(), ipv4_mapped_prefix.end(), address);
}

/// Leaves the IPv4 address in the first four of its 16 bytes, zeros in the rest, as in struct event.
inline void ipv4_from_mapped(std::uint8_t* address)
{
    std::copy_n(address + ipv4_mapped_prefix.size(), 4, address);
    std::fill_n(address + 4, ipv4_mapped_prefix.size(), std::uint8_t{0});
}

} // namespace finrace
