// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What an event says, in the words that all outputs share: names, addresses, the owner, who closed first.
// What the source could not observe comes out as "not known", never as zero.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "bpf/event.h"
#include "core/classify.h"

namespace finrace {

std::string_view kind_name(unsigned kind);   ///< enum event_kind: "peer_fin"
std::string_view loss_name(unsigned place);  ///< enum loss: "ring_full"
std::string_view state_name(unsigned state); ///< enum tcp_connection_state: "CLOSE_WAIT"
std::string error_name(int error);           ///< an errno: "ECONNREFUSED"

/// "10.0.0.1" or "2001:db8::1".
std::string address_text(const std::uint8_t* address, unsigned family);
/// "10.0.0.1:80" or "[2001:db8::1]:80".
std::string endpoint_text(const std::uint8_t* address, std::uint16_t port, unsigned family);
std::string with_port(std::string_view address, std::uint64_t port); ///< of an address's text

/// "http/1", "tls" or "http/2": by the first bytes that the connection's client sent. Empty if not known.
std::string_view protocol_name(const connection& c);

/// The owner's name as the kernel noted it, any bytes; empty if it did not.
std::string_view owner_name(const connection& c);
std::string_view to_string(PoolState state);

/// Whether the current exchange has a request whose beginning was seen, so that times may be told from it.
bool knows_request_start(const connection& c);

/// An address as events have it.
struct Address {
    std::array<std::uint8_t, 16> bytes{}; ///< network order; IPv4 in the first four
    std::uint8_t family = 4;
};
/// Of what address_text() writes; nothing if that is no address.
std::optional<Address> parse_address(const std::string& text);

/// Which end closed first, and how; `at_ns` on the clock of event.timestamp_ns.
struct Close {
    enum class By { local, peer } by;
    enum class How { fin, reset, timeout } how;
    std::uint64_t at_ns;
};
std::string_view to_string(Close::By by);
std::string_view to_string(Close::How how);
std::optional<Close> first_close(const event& e);

/// Bytes of the request that the first close left unacknowledged; of a request that went out after it, those
/// not acknowledged now. Nothing where that can't be told.
std::optional<std::uint32_t> unacked_by_close(const event& e);

/// Signed: what happens before the request lies below zero.
double milliseconds_between(std::uint64_t from_ns, std::uint64_t to_ns);

} // namespace finrace
