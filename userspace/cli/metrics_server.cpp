// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/metrics_server.h"

#include <cerrno>
#include <cstring>
#include <optional>
#include <string_view>

#include <arpa/inet.h>
#include <fmt/format.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "sink/facts.h"

namespace finrace {

namespace {

constexpr auto oldest_text = std::chrono::seconds(1);
constexpr unsigned most_connections = 32;
constexpr unsigned silence_s = 5; ///< after so long a connection is let go of
constexpr std::size_t request_bytes = 8192;
constexpr int queue_length = 64;

constexpr std::string_view text_type = "text/plain; version=0.0.4; charset=utf-8";
constexpr std::string_view found_at = "finrace's metrics are at /metrics\n";

MHD_Result answer(MHD_Connection* connection, unsigned status, std::string_view text)
{
    // Copied: a slow reader may still be at it when the next text is made.
    MHD_Response* response = MHD_create_response_from_buffer(text.size(), const_cast<char*>(text.data()),
                                                             MHD_RESPMEM_MUST_COPY); // NOLINT: it is not written to
    if (response == nullptr)
        return MHD_NO;
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, text_type.data());
    if (status == MHD_HTTP_METHOD_NOT_ALLOWED)
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    const MHD_Result queued = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return queued;
}

/// libmicrohttpd's MHD_AccessHandlerCallback.
MHD_Result on_request(void* server, MHD_Connection* connection, const char* url, const char* method, const char*,
                      const char*, std::size_t*, void**)
{
    const std::string_view asked = method;
    if (asked != MHD_HTTP_METHOD_GET && asked != MHD_HTTP_METHOD_HEAD)
        return answer(connection, MHD_HTTP_METHOD_NOT_ALLOWED, found_at);
    if (std::string_view(url) != "/metrics")
        return answer(connection, std::string_view(url) == "/" ? MHD_HTTP_OK : MHD_HTTP_NOT_FOUND, found_at);
    return answer(connection, MHD_HTTP_OK, static_cast<MetricsServer*>(server)->text());
}

Descriptor listen_on(const AddressPattern& address)
{
    const int family = address.family == 6 ? AF_INET6 : AF_INET;
    Descriptor listener(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const auto refuse = [&address] {
        throw UsageError(fmt::format("--metrics {}: {}; name an address of this host, and a port that is free",
                                     endpoint_text(address.address.data(), *address.port, address.family),
                                     std::strerror(errno)));
    };
    if (!listener)
        refuse();
    const int yes = 1;
    ::setsockopt(listener.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    sockaddr_in to4{};
    sockaddr_in6 to6{};
    to4.sin_family = AF_INET;
    to4.sin_port = htons(*address.port);
    std::memcpy(&to4.sin_addr, address.address.data(), sizeof(to4.sin_addr));
    to6.sin6_family = AF_INET6;
    to6.sin6_port = htons(*address.port);
    std::memcpy(&to6.sin6_addr, address.address.data(), sizeof(to6.sin6_addr));
    const bool bound = family == AF_INET
                           ? ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&to4), sizeof(to4)) == 0
                           : ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&to6), sizeof(to6)) == 0;
    if (!bound || ::listen(listener.get(), queue_length) != 0)
        refuse();
    return listener;
}

} // namespace

AddressPattern parse_metrics_address(const std::string& text)
{
    const std::string whole = text.find(':') == std::string::npos ? "127.0.0.1:" + text : text;
    std::optional<AddressPattern> address;
    try {
        address = parse_address_pattern(whole);
    } catch (const UsageError&) { // says what an upstream's name may be
    }
    const unsigned bits = address && address->family == 6 ? 128 : 32;
    if (!address || !address->port || *address->port == 0 || address->prefix != bits ||
        address->family == AddressPattern::any_family)
        throw UsageError(fmt::format(
            "'{}' is nowhere to listen; accepted: PORT (of 127.0.0.1), ADDR:PORT, [ADDR]:PORT for IPv6", text));
    return *address;
}

MetricsServer::MetricsServer(const AddressPattern& address, std::function<std::string()> make_text)
    : make_text_(std::move(make_text)), listener_(listen_on(address))
{
    daemon_ =
        MHD_start_daemon(MHD_USE_EPOLL, 0, nullptr, nullptr, &on_request, this, MHD_OPTION_LISTEN_SOCKET,
                         listener_.get(), MHD_OPTION_CONNECTION_LIMIT, most_connections, MHD_OPTION_CONNECTION_TIMEOUT,
                         silence_s, MHD_OPTION_CONNECTION_MEMORY_LIMIT, request_bytes, MHD_OPTION_END);
    if (daemon_ == nullptr)
        throw UsageError(fmt::format("--metrics: libmicrohttpd does not start: {}", std::strerror(errno)));
}

MetricsServer::~MetricsServer()
{
    MHD_quiesce_daemon(daemon_); // else it would close the listening socket, which is ours
    MHD_stop_daemon(daemon_);
}

int MetricsServer::descriptor() const
{
    const MHD_DaemonInfo* info = MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_EPOLL_FD);
    return info != nullptr ? info->epoll_fd : -1;
}

void MetricsServer::serve()
{
    MHD_run(daemon_);
}

const std::string& MetricsServer::text()
{
    const auto now = std::chrono::steady_clock::now();
    if (text_.empty() || now - made_ >= oldest_text) {
        text_ = make_text_();
        made_ = now;
    }
    return text_;
}

} // namespace finrace
