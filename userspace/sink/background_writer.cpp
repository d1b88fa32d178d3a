// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/background_writer.h"

#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <sys/eventfd.h>
#include <unistd.h>

namespace finrace {

struct BackgroundWriter::Shared {
    std::mutex mutex{};
    std::condition_variable changed{};
    std::string text{};
    int fd = -1;
    bool begun = false; ///< not taken up by the thread yet
    bool over = false;
    std::optional<Result> result{};
    int ended = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    Shared() = default;
    ~Shared()
    {
        if (ended >= 0)
            ::close(ended);
    }
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    Shared(Shared&&) = delete;
    Shared& operator=(Shared&&) = delete;

    void work()
    {
        std::unique_lock lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return begun || over; });
            if (over)
                return;
            begun = false;
            lock.unlock();
            const ssize_t count = ::write(fd, text.data(), text.size());
            const Result got{.count = count, .error = count < 0 ? errno : 0};
            lock.lock();
            result = got;
            const std::uint64_t one = 1;
            [[maybe_unused]] const ssize_t told = ::write(ended, &one, sizeof(one));
        }
    }
};

BackgroundWriter::BackgroundWriter() : shared_(std::make_shared<Shared>())
{
    if (shared_->ended < 0)
        throw std::system_error(errno, std::generic_category(), "eventfd()");
    std::thread([shared = shared_] { shared->work(); }).detach();
}

BackgroundWriter::~BackgroundWriter()
{
    const std::lock_guard lock(shared_->mutex);
    shared_->over = true;
    shared_->changed.notify_one();
}

void BackgroundWriter::begin(int fd, std::string_view text)
{
    const std::lock_guard lock(shared_->mutex);
    shared_->fd = fd;
    shared_->text = text;
    shared_->begun = true;
    busy_ = true;
    shared_->changed.notify_one();
}

std::optional<BackgroundWriter::Result> BackgroundWriter::result()
{
    const std::lock_guard lock(shared_->mutex);
    if (!shared_->result)
        return std::nullopt;
    std::uint64_t ended = 0;
    [[maybe_unused]] const ssize_t got = ::read(shared_->ended, &ended, sizeof(ended));
    busy_ = false;
    return std::exchange(shared_->result, std::nullopt);
}

int BackgroundWriter::descriptor() const
{
    return shared_->ended;
}

} // namespace finrace
