// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/metrics_server.h"

#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

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
constexpr unsigned silence_s = 5;                       ///< after so long without a byte a connection is let go of
constexpr auto longest_stay = std::chrono::seconds(10); ///< and after so long with some
constexpr std::size_t request_bytes = 8192;
constexpr int queue_length = 64;

constexpr const char* text_type = "text/plain; version=0.0.4; charset=utf-8";
constexpr std::string_view found_at = "finrace's metrics are at /metrics\n";

struct ResponseReleaser {
    void operator()(MHD_Response* response) const { MHD_destroy_response(response); }
};
using Response = std::unique_ptr<MHD_Response, ResponseReleaser>;

/// Whoever asks again connects again: a connection that is kept may meet the idle limit of the one who keeps it.
Response response_of(std::string_view text)
{
    Response response(MHD_create_response_from_buffer(text.size(), const_cast<char*>(text.data()), // NOLINT: is copied
                                                      MHD_RESPMEM_MUST_COPY));
    if (response) {
        MHD_add_response_header(response.get(), MHD_HTTP_HEADER_CONTENT_TYPE, text_type);
        MHD_add_response_header(response.get(), MHD_HTTP_HEADER_CONNECTION, "close");
    }
    return response;
}

} // namespace

MetricsListener::MetricsListener(const AddressPattern& address)
    : address_(address), text_(endpoint_text(address.address.data(), *address.port, address.family)),
      socket_(::socket(address.family == 6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0))
{
    if (!socket_) {
        problem_ = errno;
    } else {
        const int yes = 1;
        ::setsockopt(socket_.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
        try_to_listen();
    }
    if (problem_ != 0 && problem_ != EADDRINUSE)
        throw UsageError(fmt::format("--metrics {}: {}; name an address of this host, and a port that is free", text_,
                                     std::strerror(problem_)));
}

bool MetricsListener::try_to_listen()
{
    sockaddr_in to4{};
    sockaddr_in6 to6{};
    to4.sin_family = AF_INET;
    to4.sin_port = htons(*address_.port);
    std::memcpy(&to4.sin_addr, address_.address.data(), sizeof(to4.sin_addr));
    to6.sin6_family = AF_INET6;
    to6.sin6_port = htons(*address_.port);
    std::memcpy(&to6.sin6_addr, address_.address.data(), sizeof(to6.sin6_addr));
    if (!bound_)
        bound_ = address_.family == 6
                     ? ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&to6), sizeof(to6)) == 0
                     : ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&to4), sizeof(to4)) == 0;
    problem_ = bound_ && ::listen(socket_.get(), queue_length) == 0 ? 0 : errno;
    return problem_ == 0;
}

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

struct MetricsServer::Callbacks {
    static MHD_Result on_request(void* self, MHD_Connection* connection, const char* url, const char* method,
                                 const char*, const char*, std::size_t*, void**)
    {
        const std::string_view asked = method;
        if (asked != MHD_HTTP_METHOD_GET && asked != MHD_HTTP_METHOD_HEAD) {
            const Response refusal = response_of(found_at);
            if (refusal)
                MHD_add_response_header(refusal.get(), MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
            return MHD_queue_response(connection, MHD_HTTP_METHOD_NOT_ALLOWED, refusal.get());
        }
        const std::string_view path = url;
        if (path != "/metrics")
            return MHD_queue_response(connection, path == "/" ? MHD_HTTP_OK : MHD_HTTP_NOT_FOUND,
                                      response_of(found_at).get());
        MHD_Response* response = nullptr;
        try {
            response = static_cast<MetricsServer*>(self)->response();
        } catch (const std::exception&) { // no memory; and there is C between here and whoever could catch it
        }
        return response != nullptr ? MHD_queue_response(connection, MHD_HTTP_OK, response)
                                   : MHD_queue_response(connection, MHD_HTTP_INTERNAL_SERVER_ERROR,
                                                        response_of("no metrics now\n").get());
    }

    static void on_connection(void* self, MHD_Connection* connection, void**, MHD_ConnectionNotificationCode happened)
    {
        const MHD_ConnectionInfo* info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        if (info == nullptr)
            return;
        auto& connected = static_cast<MetricsServer*>(self)->connected_;
        if (happened == MHD_CONNECTION_NOTIFY_STARTED)
            connected[info->connect_fd] = std::chrono::steady_clock::now();
        else
            connected.erase(info->connect_fd);
    }
};

MetricsServer::MetricsServer(int listener, std::function<std::string()> make_text) : make_text_(std::move(make_text))
{
    daemon_ =
        MHD_start_daemon(MHD_USE_EPOLL, 0, nullptr, nullptr, &Callbacks::on_request, this, MHD_OPTION_LISTEN_SOCKET,
                         listener, MHD_OPTION_CONNECTION_LIMIT, most_connections, MHD_OPTION_CONNECTION_TIMEOUT,
                         silence_s, MHD_OPTION_CONNECTION_MEMORY_LIMIT, request_bytes, MHD_OPTION_NOTIFY_CONNECTION,
                         &Callbacks::on_connection, this, MHD_OPTION_END);
    if (daemon_ == nullptr)
        throw UsageError(fmt::format("--metrics: libmicrohttpd does not start: {}", std::strerror(errno)));
}

MetricsServer::~MetricsServer()
{
    MHD_quiesce_daemon(daemon_); // else it would close the listening socket, which is ours
    MHD_stop_daemon(daemon_);
    if (response_ != nullptr)
        MHD_destroy_response(response_);
}

int MetricsServer::descriptor() const
{
    const MHD_DaemonInfo* info = MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_EPOLL_FD);
    return info != nullptr ? info->epoll_fd : -1;
}

void MetricsServer::serve()
{
    const auto now = std::chrono::steady_clock::now();
    for (const auto& [fd, since] : connected_)
        if (now - since > longest_stay)
            ::shutdown(fd, SHUT_RDWR); // libmicrohttpd finds it closed, and closes it
    MHD_run(daemon_);
}

MHD_Response* MetricsServer::response()
{
    const auto now = std::chrono::steady_clock::now();
    if (response_ != nullptr && now - made_ < oldest_text)
        return response_;
    Response fresh = response_of(make_text_());
    if (!fresh)
        return nullptr;
    if (response_ != nullptr)
        MHD_destroy_response(response_); // whoever is still at it keeps it
    response_ = fresh.release();
    made_ = std::chrono::steady_clock::now(); // a long text takes a while
    return response_;
}

} // namespace finrace
