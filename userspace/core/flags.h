// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a connection's flags say, asked by name.
#pragma once

#include <cstdint>

#include "bpf/event.h"

namespace finrace {

/// RSTs that were seen as packets and that the socket did not take: what ended it may have been one of them.
inline constexpr std::uint32_t waiting_resets = CONNECTION_RESET_WITH_ACK_WAITS | CONNECTION_BARE_RESET_WAITS;

/// Any of these, enum connection_flag.
inline bool has(const connection& c, std::uint32_t flags)
{
    return (c.flags & flags) != 0;
}

/// The same of the connection that an event is about, as it was then.
inline bool has(const event& e, std::uint32_t flags)
{
    return has(e.connection, flags);
}

} // namespace finrace
