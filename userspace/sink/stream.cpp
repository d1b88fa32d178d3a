// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/stream.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

#include "sink/unix_socket.h"
#include "sink/untampered.h"

namespace finrace {

namespace {

/// A crash may have left a last line without its end: the next one must not be glued to it.
bool ends_within_a_line(const std::string& path, off_t size)
{
    const int fd = open_untampered(path, O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        return false;
    char last = '\n';
    const ssize_t got = ::pread(fd, &last, 1, size - 1);
    ::close(fd);
    return got == 1 && last != '\n';
}

/// As many whole lines as fit into `limit` bytes; of a longer line, so many bytes.
std::size_t whole_lines(std::string_view text, std::size_t limit)
{
    const std::size_t end = text.substr(0, limit).rfind('\n');
    return end == std::string_view::npos ? std::min(text.size(), limit) : end + 1;
}

std::uint64_t lines_in(std::string_view text)
{
    std::uint64_t lines = 0;
    for (std::size_t at = 0; (at = text.find('\n', at)) != std::string_view::npos; ++at) // a line's length at a time
        ++lines;
    return lines;
}

/// A file is opened anew once its last line is out; by then whoever asks for it waits.
constexpr std::chrono::milliseconds longest_wait_to_reopen(100);
/// Whoever has refused a write is not asked again for so long.
constexpr std::chrono::milliseconds refused_for(100);
/// Copied for the thread that writes it.
constexpr std::size_t most_behind = 1U << 20U;

} // namespace

void let_writes_fail()
{
    ::signal(SIGPIPE, SIG_IGN);
    ::signal(SIGXFSZ, SIG_IGN);
}

Stream::Stream(int fd, std::size_t limit) : fd_(fd), limit_(limit) {}

Stream::Stream(Stream&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), owned_(std::exchange(other.owned_, false)), socket_(other.socket_),
      pipe_(other.pipe_), may_block_(other.may_block_), reader_left_(other.reader_left_),
      within_line_(other.within_line_), ends_torn_(other.ends_torn_), problem_(other.problem_), behind_(other.behind_),
      writer_(std::move(other.writer_)), tried_again_at_(other.tried_again_at_), limit_(other.limit_),
      name_(std::move(other.name_)), backlog_(std::move(other.backlog_)), sent_(std::exchange(other.sent_, 0)),
      written_(other.written_), dropped_(other.dropped_)
{
    other.backlog_.clear();
}

Stream::~Stream()
{
    if (owned_)
        ::close(fd_);
}

Stream Stream::to_file(const std::string& path, std::size_t backlog)
{
    // O_NONBLOCK: a FIFO without a reader is refused instead of waited for.
    const int fd = open_untampered(path, O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK | O_NOCTTY, 0600);
    if (fd < 0) {
        const int error = errno;
        throw OutputError(error == ENXIO ? fmt::format("nobody reads from {}: start the pipe's reader first", path)
                                         : fmt::format("cannot open {} for appending: {}", path, std::strerror(error)),
                          error);
    }
    Stream stream(fd, backlog);
    stream.owned_ = true;
    struct stat status {};
    const bool known = ::fstat(fd, &status) == 0;
    stream.pipe_ = known && S_ISFIFO(status.st_mode);
    if (known && S_ISREG(status.st_mode) && status.st_size > 0 && ends_within_a_line(path, status.st_size) &&
        ::write(fd, "\n", 1) != 1) {
        if (const int error = errno; error != ENOSPC && error != EDQUOT)
            throw OutputError(fmt::format("cannot append to {}: {}", path, std::strerror(error)), error);
        stream.backlog_.push_back('\n'); // a full disk is no reason not to start: what was torn ends once there is room
        stream.ends_torn_ = true;
    }
    return stream;
}

Stream Stream::to_descriptor(int fd, std::size_t backlog)
{
    struct stat status {};
    if (::fstat(fd, &status) != 0)
        throw OutputError(fmt::format("cannot write to descriptor {}: {}", fd, std::strerror(errno)));
    Stream stream(fd, backlog);
    stream.socket_ = S_ISSOCK(status.st_mode);
    stream.pipe_ = S_ISFIFO(status.st_mode);
    if (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode)) {
        // O_NONBLOCK belongs to the open file, which others may share: opened anew it is ours alone.
        const std::string path = fmt::format("/proc/self/fd/{}", fd);
        const int own = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (own >= 0) {
            stream.fd_ = own;
            stream.owned_ = true;
        } else {
            stream.may_block_ = true;
        }
    }
    return stream;
}

Stream Stream::to_socket(std::string name, std::size_t backlog)
{
    // Never connected: its number is what every later connection gets.
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        throw OutputError(fmt::format("cannot write to {}: {}", name, std::strerror(errno)));
    Stream stream(fd, backlog);
    stream.owned_ = true;
    stream.socket_ = true;
    stream.name_ = std::move(name);
    stream.reader_left_ = true;
    stream.connect();
    return stream;
}

void Stream::write_behind()
{
    behind_ = true;
    try {
        write_behind_if_regular();
    } catch (const std::system_error& error) {
        throw OutputError(fmt::format("no thread can be had to write with: {}", error.what()), error.code().value());
    }
}

void Stream::write_behind_if_regular()
{
    struct stat status {};
    const bool is_regular = ::fstat(fd_, &status) == 0 && S_ISREG(status.st_mode);
    if (!is_regular)
        writer_.reset();
    else if (behind_ && !writer_)
        writer_ = std::make_unique<BackgroundWriter>();
}

void Stream::connect()
{
    const int fresh = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fresh >= 0 && connect_unix(fresh, name_) && ::dup3(fresh, fd_, O_CLOEXEC) >= 0) {
        reader_left_ = false;
        problem_ = 0;
        drop_torn_line();
    } else {
        problem_ = errno;
    }
    if (fresh >= 0)
        ::close(fresh);
}

/// All of a line is in the file but its end: whoever reads the file has it, and whoever appends to it next ends it.
bool Stream::lacks_only_its_end() const
{
    return within_line_ && !socket_ && !pipe_ && sent_ < backlog_.size() && backlog_[sent_] == '\n';
}

/// What follows is for a reader who has not seen its beginning.
void Stream::drop_torn_line()
{
    if (!within_line_)
        return;
    ++(lacks_only_its_end() ? written_ : dropped_);
    const std::size_t end = backlog_.find('\n', sent_);
    sent_ = end == std::string::npos ? backlog_.size() : end + 1;
    within_line_ = false;
}

void Stream::reopen(const std::string& path, bool discard)
{
    flush_for(longest_wait_to_reopen); // before: the path may still be the same file, and its last line a part of one
    end_write(longest_wait_to_reopen);
    if (writer_ && writer_->busy())
        throw OutputError(fmt::format("{} is not opened anew: what was written before is not taken yet", path), EBUSY);
    struct stat before {};
    const bool is_file = ::fstat(fd_, &before) == 0 && S_ISREG(before.st_mode);
    const int there = open_untampered(path, O_PATH);
    if (there >= 0)
        ::close(there);
    Stream fresh = to_file(path, limit_);
    if (there < 0 && is_file) // readers who may read the old one may read this one
        ::fchmod(fresh.fd_, before.st_mode & 0666U);
    if (!fresh.backlog_.empty()) // a torn line there, whose end finds no room
        throw OutputError(fmt::format("cannot append to {}: {}", path, std::strerror(ENOSPC)), ENOSPC);
    if (discard)
        drop_waiting();
    if (!pipe_ || reader_left_ || !is_same_file(fresh.fd_, fd_)) // else whoever reads it has seen its beginning
        drop_torn_line();                                        // the disk was full
    if (std::exchange(ends_torn_, false))
        backlog_.erase(0, 1);
    // The number stays: to everybody else it is the same output.
    if (::dup3(fresh.fd_, fd_, O_CLOEXEC) < 0) {
        const int error = errno;
        throw OutputError(fmt::format("cannot go on in {}: {}", path, std::strerror(error)), error);
    }
    pipe_ = fresh.pipe_;
    reader_left_ = false;
    problem_ = 0;
    try {
        write_behind_if_regular();
    } catch (const std::system_error&) { // a device before: then it is waited for, as it was
    }
    flush();
}

void Stream::write(std::string_view line)
{
    if (!takes(line.size())) {
        ++dropped_;
        return;
    }
    backlog_.append(line);
    backlog_.push_back('\n');
}

void Stream::write_text(std::string_view text)
{
    if (!takes(text.size())) {
        dropped_ += lines_in(text);
        return;
    }
    backlog_.append(text);
}

void Stream::flush()
{
    bool may_connect = !name_.empty();
    if (reader_left_ && std::exchange(may_connect, false))
        connect();
    if (reader_left_)
        return;
    if (writer_) {
        write_on();
        return;
    }
    problem_ = 0;
    while (waiting() > 0 && !reader_left_) {
        const char* data = backlog_.data() + sent_;
        std::size_t size = waiting();
        if (may_block_) {
            pollfd ready{.fd = fd_, .events = POLLOUT, .revents = 0};
            if (::poll(&ready, 1, 0) <= 0)
                break;
        }
        if (pipe_ || may_block_)
            size = whole_lines({data, size}, PIPE_BUF);
        const ssize_t count = socket_ ? ::send(fd_, data, size, MSG_DONTWAIT | MSG_NOSIGNAL) : ::write(fd_, data, size);
        if (take_in(count, errno))
            continue;
        if (!reader_left_ || !std::exchange(may_connect, false))
            break;
        connect(); // another reader may be there by now
    }
    trim();
}

/// Behind. What was refused is tried again after a while: the end of each write, here or in another stream, leads to
/// this.
void Stream::write_on()
{
    take_result();
    if (std::chrono::steady_clock::now() < tried_again_at_ || waiting() == 0 || writer_->busy())
        return;
    // Between two lines another file may take over.
    const std::string_view next = std::string_view(backlog_).substr(sent_);
    writer_->begin(fd_, next.substr(0, whole_lines(next, most_behind)));
}

/// Of a write behind that has ended.
void Stream::take_result()
{
    const auto result = writer_->result();
    if (!result)
        return;
    problem_ = 0;
    if (!take_in(result->count, result->error))
        tried_again_at_ = std::chrono::steady_clock::now() + refused_for;
    trim();
}

/// Waits for the write that is under way, and begins none: a disk that takes less than there is never has nothing to
/// do.
void Stream::end_write(std::chrono::milliseconds limit)
{
    if (!writer_ || !writer_->busy())
        return;
    pollfd ended = awaited();
    ::poll(&ended, 1, static_cast<int>(limit.count()));
    take_result();
}

/// What a write gave. Returns whether another may follow at once.
bool Stream::take_in(std::int64_t count, int error)
{
    if (count < 0) {
        if (error == EINTR)
            return true;
        if (error == EPIPE || error == ECONNRESET)
            reader_left_ = true;
        else if (error != EAGAIN && error != EWOULDBLOCK)
            problem_ = error;
        return false;
    }
    const std::string_view out = std::string_view(backlog_).substr(sent_, static_cast<std::size_t>(count));
    written_ += lines_in(out);
    if (!out.empty() && std::exchange(ends_torn_, false))
        --written_;
    sent_ += out.size();
    within_line_ = out.empty() ? within_line_ : out.back() != '\n';
    return true;
}

void Stream::trim()
{
    if (waiting() == 0) {
        backlog_.clear();
        sent_ = 0;
    } else if (sent_ > limit_ / 4) {
        backlog_.erase(0, sent_);
        sent_ = 0;
    }
}

pollfd Stream::awaited() const
{
    if (writer_)
        return {.fd = writer_->descriptor(), .events = POLLIN, .revents = 0};
    return {.fd = fd_, .events = POLLOUT, .revents = 0};
}

bool Stream::awaits() const
{
    if (writer_)
        return writer_->busy();
    return waiting() > 0 && problem_ == 0 && !reader_left_;
}

void Stream::flush_for(std::chrono::milliseconds limit)
{
    const auto deadline = std::chrono::steady_clock::now() + limit;
    tried_again_at_ = {};
    for (;;) {
        flush();
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        if (!awaits() || left.count() <= 0)
            break;
        pollfd ready = awaited();
        ::poll(&ready, 1, static_cast<int>(std::min<std::int64_t>(left.count(), 100)));
    }
}

void Stream::drain(std::chrono::milliseconds limit)
{
    flush_for(limit);
    drop_waiting();
}

void Stream::drop_waiting()
{
    if (writer_ && writer_->busy()) {
        if (const auto result = writer_->result())
            take_in(result->count, result->error);
        else // it may hang
            writer_.reset();
    }
    dropped_ += lines_in(std::string_view(backlog_).substr(sent_));
    if (std::exchange(ends_torn_, false))
        --dropped_;
    if (lacks_only_its_end()) {
        --dropped_;
        ++written_;
    }
    backlog_.clear();
    sent_ = 0;
    within_line_ = false;
}

} // namespace finrace
