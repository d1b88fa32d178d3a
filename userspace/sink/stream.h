// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Lines to a file, pipe, socket or terminal, for a daemon that has to outlive all of them: it never waits.
// What cannot be written now waits in a bounded backlog; beyond that, new lines are dropped and counted. A line
// once begun is always finished before another, so a reader never sees a torn one but as the last before it leaves.
// A regular file makes whoever writes wait all the same, when its disk is slow: unless write_behind() is asked for.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include <poll.h>

#include "sink/background_writer.h"

namespace finrace {

/// `number`: the errno behind it, if there is one.
struct OutputError : std::runtime_error {
    explicit OutputError(const std::string& text, int number = 0) : std::runtime_error(text), error(number) {}
    int error;
};

/// From now on a write fails, by EPIPE or EFBIG, that would end the process by SIGPIPE (nobody reads) or SIGXFSZ (the
/// file would exceed the limit of this process).
void let_writes_fail();

class Stream {
public:
    static constexpr std::size_t default_backlog = 8U << 20U;
    /// What a reader is given to take the last of it: for drain().
    static constexpr std::chrono::milliseconds last_words = std::chrono::seconds(1);

    /// Appends to the file, which is created, for its owner alone, if it is not there. Throws OutputError.
    static Stream to_file(const std::string& path, std::size_t backlog = default_backlog);
    /// Writes to what `fd` refers to, which stays open and keeps its own blocking mode. Throws OutputError.
    static Stream to_descriptor(int fd, std::size_t backlog = default_backlog);
    /// Writes to whoever listens on a UNIX stream socket, by now or later, and to the next one once that one has gone.
    /// `name`: as unix_address() takes it. Throws OutputError.
    static Stream to_socket(std::string name, std::size_t backlog = default_backlog);

    ~Stream();
    Stream(Stream&& other) noexcept;
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    Stream& operator=(Stream&&) = delete;

    /// From now on a regular file is written to by another thread, so that nothing here waits for its disk. To be
    /// called once this process has given up what it does not need: a thread keeps what it was begun with. Throws
    /// OutputError.
    void write_behind();

    /// Goes on in a file opened anew under `path`; what waits goes there too, or, with `discard`, counts as dropped.
    /// Throws OutputError, and then goes on as before: also where the old file's disk does not end the write that it is
    /// at.
    void reopen(const std::string& path, bool discard = false);

    /// Queues a line (without its newline); flush() writes it.
    void write(std::string_view line);
    /// Queues text that ends its lines itself, or is none: what steers a terminal.
    void write_text(std::string_view text);
    /// Writes as much as can be written without waiting.
    void flush();
    /// The same, waiting for at most `limit` until all of it is written, or can't be for now.
    void flush_for(std::chrono::milliseconds limit);
    /// Flushes for at most `limit`, at the end; what then remains counts as dropped.
    void drain(std::chrono::milliseconds limit);
    /// What still waits counts as dropped.
    void drop_waiting();

    [[nodiscard]] int descriptor() const { return fd_; }
    /// For poll() or epoll: what tells that flush() may go on, or that the reader has left. Regular files that are not
    /// written behind tell neither.
    [[nodiscard]] pollfd awaited() const;
    /// Whether there is anything to wait for.
    [[nodiscard]] bool awaits() const;
    /// Whether write() would take a line of so many bytes.
    [[nodiscard]] bool takes(std::size_t bytes) const { return !closed_by_reader() && waiting() + bytes + 1 <= limit_; }
    /// The reader has gone away for good: nothing that is written will be read.
    [[nodiscard]] bool closed_by_reader() const { return reader_left_ && name_.empty(); }
    void reader_left() { reader_left_ = true; }

    [[nodiscard]] std::uint64_t written() const { return written_; }
    [[nodiscard]] std::uint64_t dropped() const { return dropped_; }
    [[nodiscard]] std::size_t waiting() const { return backlog_.size() - sent_; }
    /// The errno that the last attempt met (ENOSPC and its like, which are tried again), or 0.
    [[nodiscard]] int problem() const { return problem_; }

private:
    Stream(int fd, std::size_t limit);
    void write_behind_if_regular();
    void write_on();
    void end_write(std::chrono::milliseconds limit);
    void take_result();
    bool take_in(std::int64_t count, int error);
    void trim();
    void drop_torn_line();
    [[nodiscard]] bool lacks_only_its_end() const;
    void connect();

    int fd_;
    bool owned_ = false;
    bool socket_ = false;
    bool pipe_ = false;        ///< takes whole lines of PIPE_BUF bytes at once or not at all
    bool may_block_ = false;   ///< could not be opened anew: ask poll() before each small write
    bool reader_left_ = false; ///< or has not come yet
    bool within_line_ = false; ///< only a part of a line is out
    bool ends_torn_ = false;   ///< the backlog's first byte ends another's torn line, and is no line of its own
    int problem_ = 0;
    bool behind_ = false;
    std::unique_ptr<BackgroundWriter> writer_{};             ///< of a regular file that is written behind
    std::chrono::steady_clock::time_point tried_again_at_{}; ///< after a write behind that was refused: not before
    std::size_t limit_;
    std::string name_{}; ///< of the socket to connect to; else empty
    std::string backlog_;
    std::size_t sent_ = 0; ///< bytes at the backlog's front that are out already
    std::uint64_t written_ = 0;
    std::uint64_t dropped_ = 0;
};

} // namespace finrace
