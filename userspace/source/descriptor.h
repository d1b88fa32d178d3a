// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A file descriptor that closes itself, and what it gives to read.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include <unistd.h>

namespace finrace {

class Descriptor {
public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    ~Descriptor() { reset(); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept
    {
        if (this != &other) {
            reset();
            fd_ = std::exchange(other.fd_, -1);
        }
        return *this;
    }

    [[nodiscard]] int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }

private:
    void reset()
    {
        if (fd_ >= 0)
            close(fd_);
        fd_ = -1;
    }

    int fd_ = -1;
};

/// What a file gives until it ends or can't be read any more, as a file of /proc whose process has gone, up to a limit:
/// another user's process may make its command line as long as its memory. Empty if there is no such file.
std::string read_whole(const std::string& path, std::size_t most = 1U << 20U);

} // namespace finrace
