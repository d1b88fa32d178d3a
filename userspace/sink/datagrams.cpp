// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/datagrams.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include "sink/unix_socket.h"

namespace finrace {

Datagrams::Datagrams(std::string name, std::size_t queue)
    : name_(std::move(name)), limit_(queue), fd_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0))
{
    if (fd_ < 0)
        throw OutputError(fmt::format("cannot send to {}: {}", name_, std::strerror(errno)));
    connect();
}

Datagrams::Datagrams(Datagrams&& other) noexcept
    : name_(std::move(other.name_)), limit_(other.limit_), fd_(std::exchange(other.fd_, -1)),
      connected_(other.connected_), problem_(other.problem_), queue_(std::move(other.queue_)),
      bytes_(std::exchange(other.bytes_, 0)), written_(other.written_), dropped_(other.dropped_)
{
    other.queue_.clear();
}

Datagrams::~Datagrams()
{
    if (fd_ >= 0)
        ::close(fd_);
}

bool Datagrams::connect()
{
    connected_ = connect_unix(fd_, name_);
    problem_ = connected_ ? 0 : errno;
    return connected_;
}

void Datagrams::write(std::string message)
{
    if (bytes_ + message.size() > limit_) {
        ++dropped_;
        return;
    }
    bytes_ += message.size();
    queue_.push_back(std::move(message));
}

void Datagrams::flush()
{
    if (!connected_ && !connect())
        return;
    problem_ = 0;
    for (bool connected_anew = false; !queue_.empty();) {
        const std::string& message = queue_.front();
        // sendto() without an address: the only sending call that a confined finrace has.
        if (::sendto(fd_, message.data(), message.size(), MSG_DONTWAIT | MSG_NOSIGNAL, nullptr, 0) >= 0) {
            ++written_;
        } else if (errno == EINTR) {
            continue;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
            break;
        } else if (errno == EMSGSIZE) {
            ++dropped_;
        } else {
            // Whoever listened has gone. Another may have taken the name since.
            problem_ = errno;
            if (connected_anew || !connect()) {
                connected_ = false;
                break;
            }
            connected_anew = true;
            continue;
        }
        bytes_ -= message.size();
        queue_.pop_front();
    }
}

void Datagrams::drop_waiting()
{
    dropped_ += queue_.size();
    queue_.clear();
    bytes_ = 0;
}

} // namespace finrace
