// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Messages to a UNIX datagram socket, one each, for a daemon that outlives whoever listens there: it never waits. What
// is not taken now waits in a bounded queue; beyond that, new messages are dropped and counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>

#include "sink/stream.h"

namespace finrace {

class Datagrams {
public:
    /// `name`: as unix_address() takes it. Nobody need listen there yet. Throws OutputError.
    explicit Datagrams(std::string name, std::size_t queue = Stream::default_backlog);
    ~Datagrams();
    Datagrams(Datagrams&& other) noexcept;
    Datagrams(const Datagrams&) = delete;
    Datagrams& operator=(const Datagrams&) = delete;
    Datagrams& operator=(Datagrams&&) = delete;

    /// Queues a message; flush() sends it.
    void write(std::string message);
    /// Sends as many as are taken without waiting, to whoever listens under the name by now.
    void flush();
    /// At the end: what still waits counts as dropped.
    void drop_waiting();

    /// For poll() or epoll: what tells that flush() may go on.
    [[nodiscard]] pollfd awaited() const { return {.fd = fd_, .events = POLLOUT, .revents = 0}; }
    /// Whether there is anything to wait for.
    [[nodiscard]] bool awaits() const { return !queue_.empty() && problem_ == 0; }
    [[nodiscard]] std::uint64_t written() const { return written_; }
    [[nodiscard]] std::uint64_t dropped() const { return dropped_; }
    [[nodiscard]] std::size_t waiting() const { return bytes_; }
    /// The errno that keeps it from being heard, or 0.
    [[nodiscard]] int problem() const { return problem_; }

private:
    /// Returns false where nobody listens.
    bool connect();

    std::string name_;
    std::size_t limit_;
    int fd_;
    bool connected_ = false;
    int problem_ = 0;
    std::deque<std::string> queue_;
    std::size_t bytes_ = 0; ///< in the queue
    std::uint64_t written_ = 0;
    std::uint64_t dropped_ = 0;
};

} // namespace finrace
